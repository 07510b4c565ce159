// Kernels, compiled by NVRTC from the embedded shaders on first use.
#pragma once

#include <c10/core/Device.h>

#include "../gpu/launch.h"
#include "driver.h"

namespace tqattn::cuda {

struct LoadedKernel {
  Function function;
  int max_threads;   // of a block
  int shared_bytes;  // of its own, beside what a launch adds
};

// For the device, which is the current one. The kernel is kept for the life of the process. Raises an error with the
// compiler's words if there is none.
const LoadedKernel& find_kernel(const gpu::Kernel& kernel, c10::DeviceIndex device);

}  // namespace tqattn::cuda
