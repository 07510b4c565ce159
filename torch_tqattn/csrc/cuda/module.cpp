#include "module.h"

#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_shader_sources.h"

namespace tqattn::cuda {
namespace {

// A thread of its own has no context until something sets one.
void make_context_current(c10::DeviceIndex device) {
  Context context = nullptr;
  check(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  int handle = 0;
  check(driver().cuDeviceGet(&handle, device), "cuDeviceGet");
  check(driver().cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");  // PyTorch's
  check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent");
}

// Lets this thread load modules while it captures a graph: that allocates memory, and none of the graph's.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
  int mode_ = kRelaxedCapture;
};

// The machine code of all kernels of the shader with these macros.
std::vector<char> compile(const gpu::Kernel& kernel, c10::DeviceIndex device) {
  // The shaders' functions do not say that they are for the device; their lines are for debuggers and sanitisers.
  std::vector<std::string> options{"--gpu-architecture=sm_" + std::to_string(properties(device).version), "--std=c++17",
                                   "--device-as-default-execution-space", "--generate-line-info", "--disable-warnings"};
  for (const auto& [name, value] : kernel.macros) options.push_back(std::string("-D") + name + "=" + value);
  std::vector<const char*> texts;
  for (const std::string& option : options) texts.push_back(option.c_str());

  Program program = nullptr;
  const std::string file = std::string(kernel.shader) + ".metal";
  const Driver& nvrtc = driver();
  TORCH_CHECK(nvrtc.nvrtcCreateProgram(&program, gpu::find_source(kShaderSources, kernel.shader), file.c_str(), 0,
                                       nullptr, nullptr) == 0,
              "NVRTC does not start");
  const int error = nvrtc.nvrtcCompileProgram(program, static_cast<int>(texts.size()), texts.data());
  size_t size = 0;
  std::vector<char> image;
  std::string log;
  if (error == 0) {
    nvrtc.nvrtcGetCUBINSize(program, &size);
    image.resize(size);
    nvrtc.nvrtcGetCUBIN(program, image.data());
  } else {
    nvrtc.nvrtcGetProgramLogSize(program, &size);
    log.resize(size);
    nvrtc.nvrtcGetProgramLog(program, log.data());
  }
  nvrtc.nvrtcDestroyProgram(&program);
  TORCH_CHECK(error == 0, "cannot compile ", gpu::describe(kernel), " for ", options.front(), ": NVRTC error ", error,
              "\n", log.c_str());
  return image;
}

struct Found {
  c10::DeviceIndex device;
  gpu::Kernel kernel;
  LoadedKernel loaded;
};

// Names are literals: where the same one is in two places, its kernel is found twice.
bool is_of(const Found& found, const gpu::Kernel& kernel, c10::DeviceIndex device) {
  return found.device == device && found.kernel.name == kernel.name && found.kernel.macros == kernel.macros;
}

size_t hash_of(const gpu::Kernel& kernel, c10::DeviceIndex device) {
  size_t hash = c10::get_hash(device, kernel.name);
  for (const auto& [name, value] : kernel.macros) hash = c10::hash_combine(hash, c10::get_hash(value));
  return hash;
}

LoadedKernel load(const gpu::Kernel& kernel, Module module, c10::DeviceIndex device) {
  LoadedKernel loaded{};
  check(driver().cuModuleGetFunction(&loaded.function, module, kernel.name), kernel.name);
  check(driver().cuFuncGetAttribute(&loaded.max_threads, kMaxThreadsPerBlock, loaded.function), kernel.name);
  check(driver().cuFuncGetAttribute(&loaded.shared_bytes, kSharedBytes, loaded.function), kernel.name);
  // Beyond 48 KB the driver wants to be told.
  const int available = static_cast<int>(properties(device).shared_bytes) - loaded.shared_bytes;
  check(driver().cuFuncSetAttribute(loaded.function, kMaxDynamicSharedBytes, available), kernel.name);
  return loaded;
}

}  // namespace

const LoadedKernel& find_kernel(const gpu::Kernel& kernel, c10::DeviceIndex device) {
  make_context_current(device);
  // Never destroyed: threads may still be running kernels while the process ends.
  static auto* mutex = new std::mutex;
  static auto* modules = new std::map<std::string, Module>;
  static auto* kernels = new std::unordered_multimap<size_t, Found>;
  const size_t hash = hash_of(kernel, device);
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto [begin, end] = kernels->equal_range(hash);
  for (auto found = begin; found != end; ++found) {
    if (is_of(found->second, kernel, device)) return found->second.loaded;
  }
  const RelaxedCapture relaxed;
  // The kernels of a shader are compiled together.
  const std::string module_key = std::to_string(device) + " " + gpu::describe({kernel.shader, "all", kernel.macros});
  if (modules->count(module_key) == 0) {
    const std::vector<char> image = compile(kernel, device);
    Module module = nullptr;
    check(driver().cuModuleLoadData(&module, image.data()), kernel.name);
    modules->emplace(module_key, module);
  }
  return kernels->emplace(hash, Found{device, kernel, load(kernel, modules->at(module_key), device)})->second.loaded;
}

}  // namespace tqattn::cuda
