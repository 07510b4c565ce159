// Puts kernel launches on torch's stream.
#pragma once

#include <vector>

#include "../gpu/launch.h"

namespace tqattn::mps {

// Encodes the launches, each after the one before it, behind whatever torch has encoded. Nothing is committed.
void encode(const std::vector<gpu::Launch>& launches);

}  // namespace tqattn::mps
