#import "pipeline.h"

#include <ATen/mps/MPSDevice.h>
#include <c10/util/Exception.h>

#include <mutex>
#include <unordered_map>

#include "shader_sources.h"

namespace tqattn::mps {
namespace {

NSString* string(const std::string& text) { return [NSString stringWithUTF8String:text.c_str()]; }

MTLCompileOptions* make_options(const gpu::Kernel& kernel) {
  NSMutableDictionary<NSString*, NSObject*>* macros = [NSMutableDictionary dictionary];
  for (const auto& [name, value] : kernel.macros) [macros setObject:string(value) forKey:string(name)];
  MTLCompileOptions* options = [[[MTLCompileOptions alloc] init] autorelease];
  options.preprocessorMacros = macros;
  options.languageVersion = MTLLanguageVersion3_1;
  options.fastMathEnabled = NO;
  return options;
}

// Owned by the caller; nil with a message in `complaint` if it cannot be made. It raises nothing: an exception would
// leave the autorelease pool behind.
id<MTLComputePipelineState> compile(const gpu::Kernel& kernel, const char* source, std::string& complaint) {
  @autoreleasepool {
    id<MTLDevice> device = at::mps::MPSDevice::getInstance()->device();
    NSError* error = nil;
    id<MTLLibrary> library = [device newLibraryWithSource:string(source) options:make_options(kernel) error:&error];
    id<MTLFunction> function = [library newFunctionWithName:string(kernel.name)];
    id<MTLComputePipelineState> pipeline = nil;
    if (function != nil) pipeline = [device newComputePipelineStateWithFunction:function error:&error];
    if (pipeline == nil) {
      complaint = library != nil && function == nil ? "it has no such kernel" : "";
      if (error != nil) complaint += error.localizedDescription.UTF8String;
    }
    [function release];
    [library release];
    return pipeline;
  }
}

}  // namespace

id<MTLComputePipelineState> find_pipeline(const gpu::Kernel& kernel) {
  // Never destroyed: threads may still be running kernels while the process ends.
  static auto* mutex = new std::mutex;
  static auto* pipelines = new std::unordered_map<std::string, id<MTLComputePipelineState>>;
  const std::string key = describe(kernel);
  const std::lock_guard<std::mutex> lock(*mutex);
  id<MTLComputePipelineState>& pipeline = (*pipelines)[key];
  if (pipeline == nil) {
    std::string complaint;
    pipeline = compile(kernel, gpu::find_source(kShaderSources, kernel.shader), complaint);
    TORCH_CHECK(pipeline != nil, "cannot compile ", key, ": ", complaint);
  }
  return pipeline;
}

}  // namespace tqattn::mps
