// The classes of the double of Metal, as the stream sees them.
#pragma once

#include <Metal/Metal.h>

#include "foundation.h"

@interface DoubleDevice : NSObject <MTLDevice>
+ (id<MTLDevice>)shared;
@end

@interface DoubleCommandQueue : NSObject <MTLCommandQueue>
@end

namespace metal_double {

// A new encoder, owned by the caller. What it encodes waits until synchronize().
id<MTLComputeCommandEncoder> new_encoder();

// What the stream does when it ends an encoder; code that shares the stream's encoder must not.
void end_encoder(id<MTLComputeCommandEncoder> encoder);

void execute_pending();

}  // namespace metal_double
