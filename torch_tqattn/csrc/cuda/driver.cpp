#include "driver.h"

#include <ATen/Context.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <array>
#include <limits>
#include <mutex>
#include <string>

namespace tqattn::cuda {
namespace {

constexpr int kEarlyStartsInGraphs = 12030;  // CUDA 12.3

// This library of PyTorch depends on the NVRTC that belongs to it and on the driver: it finds both.
void* open_libraries() {
  Dl_info torch{};
  TORCH_CHECK(dladdr(reinterpret_cast<void*>(&at::globalContext), &torch) != 0, "PyTorch's libraries are not found");
  const std::string file = torch.dli_fname;
  const std::string path = file.substr(0, file.rfind('/') + 1) + "libcaffe2_nvrtc.so";
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "CUDA kernels are compiled by PyTorch's NVRTC, which cannot be loaded: ", dlerror());
  return library;
}

template <typename F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  TORCH_CHECK(function != nullptr, "the CUDA driver or NVRTC has no ", name, ": ", dlerror());
}

Driver load() {
  void* library = open_libraries();
  Driver functions{};
#define TQ_FIND(name, parameters) find(library, #name, functions.name);
  TQ_DRIVER_FUNCTIONS(TQ_FIND)
#undef TQ_FIND
  return functions;
}

}  // namespace

const Driver& driver() {
  static const Driver functions = load();
  return functions;
}

void check(int result, const char* what) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  TORCH_CHECK(false, what, ": CUDA error ", result, ", ", text != nullptr ? text : "which the driver does not know");
}

const DeviceProperties& properties(int device) {
  constexpr int kMost = std::numeric_limits<c10::DeviceIndex>::max() + 1;
  static std::array<std::once_flag, kMost> flags;
  static std::array<DeviceProperties, kMost> known;
  DeviceProperties& found = known.at(device);
  std::call_once(flags.at(device), [&] {
    int handle = 0, driver_version = 0;
    check(driver().cuDeviceGet(&handle, device), "cuDeviceGet");
    check(driver().cuDriverGetVersion(&driver_version), "cuDriverGetVersion");
    const auto attribute = [&](int name) {
      int value = 0;
      check(driver().cuDeviceGetAttribute(&value, name, handle), "cuDeviceGetAttribute");
      return static_cast<uint32_t>(value);
    };
    const uint32_t version = 10 * attribute(kMajorVersion) + attribute(kMinorVersion);
    found = {attribute(kMultiprocessors), version, attribute(kMaxSharedBytesOfKernel),
             version >= 90 && driver_version >= kEarlyStartsInGraphs};
  });
  return found;
}

}  // namespace tqattn::cuda
