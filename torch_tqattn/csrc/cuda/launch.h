// Puts kernel launches on torch's current stream.
#pragma once

#include <c10/core/Device.h>

#include <vector>

#include "../gpu/launch.h"

namespace tqattn::cuda {

// Each launch runs after the one before it. Nothing is waited for.
void launch(const std::vector<gpu::Launch>& launches, c10::Device device);

}  // namespace tqattn::cuda
