#include "launch.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <limits>

#include "driver.h"
#include "module.h"

namespace tqattn::cuda {
namespace {

using gpu::Argument;
using gpu::Launch;

constexpr uint32_t kSimdLanes = 32;
constexpr uint32_t kMostGroups = 65535;  // of a grid, in its second and third dimension

uint32_t count_groups(const Launch& launch) {
  uint64_t count = 1;
  for (const uint32_t groups : launch.groups) {
    count *= groups;
    TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max(), launch.kernel.name,
                      " takes at most 2^31 - 1 threadgroups; this call needs ", launch.groups[0], " x ",
                      launch.groups[1], " x ", launch.groups[2], "; split it by batch or by queries");
  }
  return static_cast<uint32_t>(count);
}

// Kernels have one block of memory for their threadgroups.
uint32_t shared_bytes(const Launch& launch) {
  TORCH_INTERNAL_ASSERT(launch.threadgroup_bytes.size() <= 1);
  return launch.threadgroup_bytes.empty() ? 0 : launch.threadgroup_bytes.front();
}

void check_limits(const Launch& launch, const LoadedKernel& kernel, c10::DeviceIndex device) {
  const char* name = launch.kernel.name;
  const uint32_t threads = launch.simdgroups * kSimdLanes;
  TORCH_CHECK(threads <= static_cast<uint32_t>(kernel.max_threads), name, " is launched with ", threads,
              " threads a block; on this device it may have ", kernel.max_threads);
  const uint32_t bytes = kernel.shared_bytes + shared_bytes(launch);
  const uint32_t available = properties(device).shared_bytes;
  TORCH_CHECK(bytes <= available, name, " needs ", bytes, " bytes of shared memory; this device has ", available);
}

void* address(const Launch& launch, size_t index) {
  const Argument& argument = launch.arguments[index];
  void* begin = argument.tensor.data_ptr();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(begin) % argument.alignment == 0, "argument ", index, " of ",
              launch.kernel.name, " begins at byte ", reinterpret_cast<uintptr_t>(begin),
              " of memory; it must begin at a multiple of ", argument.alignment);
  return begin;
}

}  // namespace

void launch(const std::vector<Launch>& launches, c10::Device device) {
  const c10::DeviceGuard guard(device);
  void* stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  for (const Launch& launch : launches) {
    const LoadedKernel& kernel = find_kernel(launch.kernel, device.index());
    check_limits(launch, kernel, device.index());
    const size_t count = launch.arguments.size();
    c10::SmallVector<void*, 16> addresses(count), parameters(count + 1);
    for (size_t i = 0; i < count; ++i) {
      const Argument& argument = launch.arguments[i];
      if (argument.tensor.defined()) addresses[i] = address(launch, i);  // null for a pointer that is not followed
      parameters[i] =
          argument.bytes.empty() ? static_cast<void*>(&addresses[i]) : const_cast<uint8_t*>(argument.bytes.data());
    }
    parameters[count] = const_cast<uint32_t*>(launch.groups.data());
    c10::SmallVector<LaunchAttribute, 2> attributes;
    // Every kernel waits for those ahead of it by itself (shaders/order.h).
    if (properties(device.index()).starts_early) {
      attributes.emplace_back().id = kProgrammaticStreamSerialization;
      attributes.back().value = 1;
    }
    if (launch.cluster > 1) {
      attributes.emplace_back().id = kClusterDimension;
      attributes.back().cluster[0] = launch.cluster;
      attributes.back().cluster[1] = attributes.back().cluster[2] = 1;
    }
    LaunchConfig config{};
    const auto& groups = launch.groups;
    const bool fits = groups[1] <= kMostGroups && groups[2] <= kMostGroups;  // else all are counted in one dimension
    config.grid[0] = fits ? groups[0] : count_groups(launch);
    config.grid[1] = fits ? groups[1] : 1;
    config.grid[2] = fits ? groups[2] : 1;
    config.block[0] = launch.simdgroups * kSimdLanes;
    config.block[1] = config.block[2] = 1;
    config.shared_bytes = shared_bytes(launch);
    config.stream = stream;
    config.attributes = attributes.data();
    config.attribute_count = static_cast<unsigned>(attributes.size());
    check(driver().cuLaunchKernelEx(&config, kernel.function, parameters.data(), nullptr), launch.kernel.name);
  }
}

}  // namespace tqattn::cuda
