// Compute pipelines, compiled from the embedded shaders on first use.
#pragma once

#import <Metal/Metal.h>

#include "../gpu/launch.h"

namespace tqattn::mps {

// The pipeline is kept for the life of the process. Raises an error with the compiler's words if there is none.
id<MTLComputePipelineState> find_pipeline(const gpu::Kernel& kernel);

}  // namespace tqattn::mps
