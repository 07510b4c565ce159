#include "encode.h"

#include <ATen/mps/MPSStream.h>
#include <c10/util/Exception.h>

#include <exception>

#import "pipeline.h"

namespace tqattn::mps {
namespace {

using gpu::Argument;
using gpu::Launch;

constexpr uint32_t kSimdLanes = 32;

// Runs `body` on the queue, and raises here what it raised there: an exception must not cross dispatch_sync.
template <typename Body>
void run_on(dispatch_queue_t queue, const Body& body) {
  std::exception_ptr error;
  std::exception_ptr* const caught = &error;
  const Body* const run = &body;
  dispatch_sync(queue, ^{
    @autoreleasepool {
      try {
        (*run)();
      } catch (...) {
        *caught = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t byte_offset(const at::Tensor& x) { return x.storage_offset() * x.element_size(); }

// The driver would stop the process, or do nothing at all.
void check(const Launch& launch, id<MTLComputePipelineState> pipeline) {
  const char* name = launch.kernel.name;
  TORCH_CHECK(pipeline.threadExecutionWidth == kSimdLanes, name, " is for simdgroups of ", kSimdLanes,
              " lanes; on this device they have ", pipeline.threadExecutionWidth);
  const NSUInteger threads = launch.simdgroups * kSimdLanes;
  TORCH_CHECK(threads <= pipeline.maxTotalThreadsPerThreadgroup, name, " is launched with ", threads,
              " threads a threadgroup; on this device it may have ", pipeline.maxTotalThreadsPerThreadgroup);
  uint64_t bytes = pipeline.staticThreadgroupMemoryLength;
  for (const uint32_t length : launch.threadgroup_bytes) {
    TORCH_INTERNAL_ASSERT(length % 16 == 0, name, ": ", length, " bytes of threadgroup memory");
    bytes += length;
  }
  const uint64_t available = at::mps::MPSDevice::getInstance()->device().maxThreadgroupMemoryLength;
  TORCH_CHECK(bytes <= available, name, " needs ", bytes, " bytes of threadgroup memory; this device has ", available);
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    const Argument& argument = launch.arguments[i];
    if (!argument.tensor.defined()) continue;
    TORCH_CHECK(byte_offset(argument.tensor) % argument.alignment == 0, "argument ", i, " of ", name,
                " begins at byte ", byte_offset(argument.tensor), " of its storage; it must begin at a multiple of ",
                argument.alignment);
  }
}

// torch's allocator hands out the buffer object itself for the address of a storage.
id<MTLBuffer> buffer(const at::Tensor& x) { return __builtin_bit_cast(id<MTLBuffer>, x.storage().data()); }

void bind(id<MTLComputeCommandEncoder> encoder, const std::vector<Argument>& arguments) {
  // For pointers that are not followed, any buffer. Metal's validation refuses bytes where a kernel might write.
  id<MTLBuffer> any = nil;
  for (const Argument& argument : arguments) {
    if (argument.tensor.defined()) any = buffer(argument.tensor);
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& argument = arguments[i];
    if (argument.tensor.defined()) {
      [encoder setBuffer:buffer(argument.tensor) offset:byte_offset(argument.tensor) atIndex:i];
    } else if (argument.bytes.empty()) {
      [encoder setBuffer:any offset:0 atIndex:i];
    } else {
      [encoder setBytes:argument.bytes.data() length:argument.bytes.size() atIndex:i];
    }
  }
}

}  // namespace

void encode(const std::vector<Launch>& launches) {
  std::vector<id<MTLComputePipelineState>> pipelines;
  for (const Launch& launch : launches) {
    pipelines.push_back(find_pipeline(launch.kernel));
    check(launch, pipelines.back());
  }
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  run_on(stream->queue(), [&] {
    id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
    for (size_t n = 0; n < launches.size(); ++n) {
      const Launch& launch = launches[n];
      // torch's encoder runs one dispatch after the other today; with a barrier it may stop doing so.
      [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];
      [encoder setComputePipelineState:pipelines[n]];
      bind(encoder, launch.arguments);
      for (size_t i = 0; i < launch.threadgroup_bytes.size(); ++i) {
        [encoder setThreadgroupMemoryLength:launch.threadgroup_bytes[i] atIndex:i];
      }
      [encoder dispatchThreadgroups:MTLSizeMake(launch.groups[0], launch.groups[1], launch.groups[2])
              threadsPerThreadgroup:MTLSizeMake(launch.simdgroups * kSimdLanes, 1, 1)];
    }
  });
}

}  // namespace tqattn::mps
