// An extension that copies numbers with a kernel, and makes one mistake, named by its argument: the double has to see
// it.
#include <ATen/mps/MPSStream.h>
#include <torch/library.h>

#include <stdexcept>

namespace {

const char* const kSource = R"(
#include <metal_stdlib>
using namespace metal;
kernel void copy_numbers(device const float* from [[buffer(0)]], device float* to [[buffer(1)]],
                         constant uint& count [[buffer(2)]], threadgroup float* scratch [[threadgroup(0)]],
                         uint i [[thread_position_in_grid]], uint local [[thread_index_in_threadgroup]]) {
  scratch[local] = i < count ? from[i] : 0.0f;
  if (i < count) to[i] = scratch[local];
}
)";

id<MTLComputePipelineState> compile(BOOL fast_math) {
  @autoreleasepool {
    MTLCompileOptions* options = [[[MTLCompileOptions alloc] init] autorelease];
    options.languageVersion = MTLLanguageVersion3_1;
    options.fastMathEnabled = fast_math;
    id<MTLDevice> device = at::mps::MPSDevice::getInstance()->device();
    id<MTLLibrary> library = [device newLibraryWithSource:[NSString stringWithUTF8String:kSource]
                                                  options:options
                                                    error:nil];
    id<MTLFunction> function = [library newFunctionWithName:@"copy_numbers"];
    id<MTLComputePipelineState> pipeline = [device newComputePipelineStateWithFunction:function error:nil];
    [function release];
    [library release];
    return pipeline;
  }
}

id<MTLBuffer> buffer(const at::Tensor& x) { return __builtin_bit_cast(id<MTLBuffer>, x.storage().data()); }

void encode(id<MTLComputeCommandEncoder> encoder, const at::Tensor& from, const at::Tensor& to,
            std::string_view mistake) {
  static id<MTLComputePipelineState> pipeline = compile(NO);
  const uint32_t count = static_cast<uint32_t>(from.numel());
  [encoder setComputePipelineState:mistake == "nil pipeline" ? nil : pipeline];
  NSUInteger offset = from.storage_offset() * sizeof(float);
  if (mistake == "offset outside") offset = buffer(from).length;
  if (mistake == "misaligned offset") offset += 2;
  if (mistake != "unbound buffer") [encoder setBuffer:buffer(from) offset:offset atIndex:0];
  [encoder setBuffer:buffer(to) offset:to.storage_offset() * sizeof(float) atIndex:1];
  if (mistake == "bytes for a result") [encoder setBytes:&count length:sizeof(count) atIndex:1];
  if (mistake == "large bytes") {
    const std::vector<char> bytes(4097);
    [encoder setBytes:bytes.data() length:bytes.size() atIndex:2];
  }
  if (mistake == "index 31") [encoder setBytes:&count length:sizeof(count) atIndex:31];
  [encoder setBytes:&count length:mistake == "small bytes" ? 2 : sizeof(count) atIndex:2];
  if (mistake == "odd threadgroup memory") [encoder setThreadgroupMemoryLength:40 atIndex:0];
  if (mistake == "large threadgroup memory") [encoder setThreadgroupMemoryLength:32784 atIndex:0];
  if (mistake != "no threadgroup memory") [encoder setThreadgroupMemoryLength:128 atIndex:0];
  const NSUInteger threads = mistake == "too many threads" ? 1025 : 32;
  const NSUInteger groups = mistake == "empty grid" ? 0 : (count + threads - 1) / threads;
  if (mistake == "end of encoding") [encoder endEncoding];
  [encoder dispatchThreadgroups:MTLSizeMake(groups, 1, 1) threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
}

template <typename Body>
void run_on_queue(const Body& body) {
  std::exception_ptr error;
  std::exception_ptr* const caught = &error;
  const Body* const run = &body;
  dispatch_sync(at::mps::getCurrentMPSStream()->queue(), ^{
    try {
      (*run)();
    } catch (...) {
      *caught = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

void copy_numbers(const at::Tensor& from, const at::Tensor& to, std::string_view mistake) {
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  if (mistake == "fast math") {
    compile(YES);
  } else if (mistake == "encoder fetched outside the queue") {
    stream->commandEncoder();
  } else if (mistake == "encoder used outside the queue") {
    id<MTLComputeCommandEncoder> encoder = nil;
    run_on_queue([&] { encoder = stream->commandEncoder(); });
    encode(encoder, from, to, mistake);
  } else if (mistake == "encoder kept" || mistake == "encoder retained") {
    id<MTLComputeCommandEncoder> encoder = nil;
    run_on_queue([&] { encoder = stream->commandEncoder(); });
    if (mistake == "encoder retained") [encoder retain];
    from.cpu();  // torch synchronises
    run_on_queue([&] { encode(encoder, from, to, mistake); });
  } else if (mistake == "nested dispatch_sync") {
    run_on_queue([] { run_on_queue([] {}); });
  } else if (mistake == "synchronisation on the queue") {
    run_on_queue([&] { from.cpu(); });
  } else if (mistake == "exception across dispatch_sync") {
    dispatch_sync(stream->queue(), ^{
      throw std::runtime_error("thrown in a block");
    });
  } else if (mistake == "synchronisation") {
    stream->synchronize(at::mps::SyncType::COMMIT_AND_WAIT);
  } else if (mistake == "command buffer") {
    stream->commandBuffer();
  } else if (mistake == "over-release") {
    @autoreleasepool {
      [[NSString stringWithUTF8String:"text"] release];
    }
  } else if (mistake == "use of a freed object") {
    NSString* text = nil;
    @autoreleasepool {
      text = [NSString stringWithUTF8String:"text"];
    }
    (void)text.length;
  } else if (mistake == "no autorelease pool") {
    [NSString stringWithUTF8String:"text"];
  } else if (mistake == "leak") {
    [[NSMutableDictionary alloc] init];
  } else {
    run_on_queue([&] { encode(stream->commandEncoder(), from, to, mistake); });
  }
}

TORCH_LIBRARY(metal_mistakes, m) {
  m.def("copy_numbers(Tensor from, Tensor(a!) to, str mistake) -> ()", &copy_numbers);
}

}  // namespace
