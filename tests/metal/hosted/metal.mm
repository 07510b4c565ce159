// The double of Metal: objects that conform to the protocols, check what a real driver or its validation layer would
// object to, record what is encoded, and execute it when the stream is synchronised.
#include "metal.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "../executed/kernel_abi.h"
#include "double.h"

namespace metal_double {
namespace {

constexpr size_t kMaxSetBytes = 4096;
constexpr size_t kThreadgroupMemory = 32768;
constexpr size_t kGuardBytes = 256;  // after each buffer, to see what is written past its end
constexpr unsigned char kUnwritten = 0xFB, kFreed = 0xDD, kGuard = 0xA5;

std::string compiler_command;
size_t max_threads = MSL_MAX_THREADS;
std::atomic<size_t> live_bytes = 0;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  const auto append = [&message](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (append(parts), ...);
  fail(message);
}

class Memory {
 public:
  void allocate(size_t size) {
    size_ = size;
    data_.reset(static_cast<char*>(std::aligned_alloc(256, (size + kGuardBytes + 255) / 256 * 256)));
    memset(data_.get(), kUnwritten, size);
    memset(data_.get() + size, kGuard, kGuardBytes);
    live_bytes += size;
  }
  ~Memory() {
    if (data_ == nullptr) return;
    memset(data_.get(), kFreed, size_);
    live_bytes -= size_;
  }
  char* data() const { return data_.get(); }
  size_t size() const { return size_; }
  bool is_guard_intact() const {
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (static_cast<unsigned char>(data_.get()[size_ + i]) != kGuard) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

struct Binding {
  Ref buffer;
  size_t offset = 0;
  std::vector<char> bytes;
  char* data() { return buffer.get() != nil ? buffer_contents(buffer.get()) + offset : bytes.data(); }
  size_t size() const { return buffer.get() != nil ? [(id<MTLBuffer>)buffer.get() length] - offset : bytes.size(); }
};

// What an encoder holds, and a dispatch takes a copy of: bindings stay from one dispatch to the next.
struct State {
  Ref pipeline;
  std::array<Binding, MSL_MAX_BINDINGS> buffers;
  std::array<uint64_t, MSL_MAX_BINDINGS> threadgroup_bytes{};
};

struct Dispatch {
  State state;
  MTLSize groups;
  MTLSize threads;
};

std::deque<Dispatch>& waiting() {
  static auto* dispatches = new std::deque<Dispatch>;
  return *dispatches;
}

std::string read_all(FILE* file) {
  std::string text;
  char chunk[4096];
  for (size_t n; (n = fread(chunk, 1, sizeof(chunk), file)) > 0;) text.append(chunk, n);
  return text;
}

// A file that is gone when this is.
struct TemporaryFile {
  char path[32] = "/tmp/metal_double_XXXXXX";
  int descriptor = mkstemp(path);
  TemporaryFile() { require(descriptor >= 0, "no temporary file"); }
  ~TemporaryFile() {
    close(descriptor);
    unlink(path);
  }
};

struct Compiled {
  std::string path;       // empty if the source is wrong
  std::string complaint;  // the compiler's
};

Compiled compile(const std::string& source, const std::map<std::string, std::string>& macros) {
  require(!compiler_command.empty(), "the double has no compiler yet");
  TemporaryFile input, complaints;
  require(write(input.descriptor, source.data(), source.size()) == static_cast<ssize_t>(source.size()), "disk full");
  std::string command = compiler_command;
  for (const auto& [name, value] : macros) command += " '-D" + name + "=" + value + "'";
  command += std::string(" < ") + input.path + " 2> " + complaints.path;
  FILE* output = popen(command.c_str(), "r");
  require(output != nullptr, "cannot run: ", command);
  std::string path = read_all(output);
  if (pclose(output) == 0) {
    while (!path.empty() && path.back() == '\n') path.pop_back();
    return {path, ""};
  }
  const std::unique_ptr<FILE, int (*)(FILE*)> complaint(fopen(complaints.path, "r"), fclose);
  return {"", read_all(complaint.get())};
}

}  // namespace
}  // namespace metal_double

using namespace metal_double;

@interface DoubleBuffer : NSObject <MTLBuffer> {
 @public
  Memory _memory;
}
@end

@interface DoubleLibrary : NSObject <MTLLibrary> {
 @public
  const MslKernel* (*_find)(const char*);
}
@end

@interface DoubleFunction : NSObject <MTLFunction> {
 @public
  const MslKernel* _kernel;
}
@end

@interface DoublePipeline : NSObject <MTLComputePipelineState> {
 @public
  const MslKernel* _kernel;
}
@end

@interface DoubleEncoder : NSObject <MTLComputeCommandEncoder> {
 @public
  State _state;
  bool _isEnded;
}
@end

@implementation DoubleBuffer
- (NSUInteger)length {
  return _memory.size();
}
- (void*)contents {
  return _memory.data();
}
@end

@implementation MTLCompileOptions {
  Ref _macros;
  BOOL _fastMath;
  MTLLanguageVersion _version;
}
- (instancetype)init {
  _fastMath = YES;  // Apple's default
  return self;
}
- (void)setPreprocessorMacros:(NSDictionary*)macros {
  _macros = Ref([[macros copy] autorelease]);
}
- (NSDictionary*)preprocessorMacros {
  return _macros.get();
}
- (void)setFastMathEnabled:(BOOL)enabled {
  _fastMath = enabled;
}
- (BOOL)fastMathEnabled {
  return _fastMath;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  _version = version;
}
- (MTLLanguageVersion)languageVersion {
  return _version;
}
- (id)copyWithZone:(NSZone*)zone {
  fail("MTLCompileOptions are not copied");
}
@end

@implementation DoubleDevice
+ (id<MTLDevice>)shared {
  static DoubleDevice* device = [DoubleDevice new];
  return device;
}
- (NSUInteger)maxThreadgroupMemoryLength {
  return kThreadgroupMemory;
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(__autoreleasing NSError**)error {
  require(options != nil && !options.fastMathEnabled, "fast math was not switched off");
  require(options.languageVersion == MTLLanguageVersion3_1, "the language version is not Metal 3.1");
  const Compiled compiled = compile(source.UTF8String, strings(options.preprocessorMacros));
  if (compiled.path.empty()) {
    if (error != nullptr) *error = make_error(compiled.complaint);
    return nil;
  }
  void* handle = dlopen(compiled.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  require(handle != nullptr, "cannot load ", compiled.path, ": ", handle == nullptr ? dlerror() : "");
  DoubleLibrary* library = [DoubleLibrary new];
  library->_find = reinterpret_cast<const MslKernel* (*)(const char*)>(dlsym(handle, "msl_find_kernel"));
  require(library->_find != nullptr, compiled.path, " has no msl_find_kernel");
  return library;
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(__autoreleasing NSError**)error {
  require(function != nil, "pipeline of a nil function");
  DoublePipeline* pipeline = [DoublePipeline new];
  pipeline->_kernel = ((DoubleFunction*)function)->_kernel;
  return pipeline;
}
@end

@implementation DoubleCommandQueue
@end

@implementation DoubleLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString*)name {
  const MslKernel* kernel = _find(name.UTF8String);
  if (kernel == nullptr) return nil;
  DoubleFunction* function = [DoubleFunction new];
  function->_kernel = kernel;
  return function;
}
@end

@implementation DoubleFunction
@end

@implementation DoublePipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return max_threads;
}
- (NSUInteger)threadExecutionWidth {
  return MSL_SIMD_WIDTH;
}
- (NSUInteger)staticThreadgroupMemoryLength {
  return _kernel->static_threadgroup_bytes;
}
@end

namespace metal_double {
namespace {

void check_encoder(DoubleEncoder* encoder) {
  require(!encoder->_isEnded, "the encoder was used after the stream ended it: fetch it anew in each block");
  require(is_on_queue(), "the encoder was used outside dispatch_sync on the stream's queue");
}

// What Metal's validation layer says of a dispatch.
void check_dispatch(const State& state, MTLSize groups, MTLSize threads) {
  DoublePipeline* pipeline = state.pipeline.get();
  require(pipeline != nil, "dispatch without a pipeline");
  const MslKernel& kernel = *pipeline->_kernel;
  const size_t thread_count = threads.width * threads.height * threads.depth;
  require(groups.width > 0 && groups.height > 0 && groups.depth > 0 && thread_count > 0,
          "dispatch of nothing: ", groups.width, "x", groups.height, "x", groups.depth, " groups of ", thread_count,
          " threads");
  require(thread_count <= max_threads, thread_count, " threads a threadgroup; the pipeline allows ", max_threads);
  require(std::max({groups.width, groups.height, groups.depth}) <= UINT32_MAX, "the grid is larger than 32 bits");
  size_t threadgroup_bytes = kernel.static_threadgroup_bytes;
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const MslArgument& argument = kernel.arguments[i];
    const auto check = [&](bool condition, const auto&... parts) {
      require(condition, kernel.name, ", argument ", argument.name, " at index ", argument.index, ": ", parts...);
    };
    if (argument.kind == MSL_THREADGROUP) {
      check(state.threadgroup_bytes[argument.index] > 0, "no length of threadgroup memory was set");
      threadgroup_bytes += state.threadgroup_bytes[argument.index];
    } else if (argument.kind == MSL_BUFFER) {
      const Binding& binding = state.buffers[argument.index];
      check(binding.size() > 0, "nothing is bound there");
      check(!argument.writable || binding.buffer.get() != nil, "read-only bytes are bound where the kernel may write");
      check(binding.size() >= argument.size, binding.size(), " bytes are bound; it has ", argument.size);
      check(binding.offset % argument.alignment == 0, "offset ", binding.offset, " is not aligned to ",
            argument.alignment, " bytes");
    }
  }
  require(threadgroup_bytes <= kThreadgroupMemory, threadgroup_bytes, " bytes of threadgroup memory; there are ",
          kThreadgroupMemory);
}

uint32_t narrow(size_t value) { return static_cast<uint32_t>(value); }

void execute(Dispatch& dispatch) {
  static uint64_t seed = 0;  // each dispatch proceeds in an order of its own
  const MslKernel& kernel = *((DoublePipeline*)dispatch.state.pipeline.get())->_kernel;
  State& state = dispatch.state;
  std::array<void*, MSL_MAX_BINDINGS> buffers;
  std::array<uint64_t, MSL_MAX_BINDINGS> sizes;
  for (size_t i = 0; i < MSL_MAX_BINDINGS; ++i) {
    buffers[i] = state.buffers[i].size() > 0 ? state.buffers[i].data() : nullptr;
    sizes[i] = state.buffers[i].size();
  }
  char error[4096] = "";
  const MslDispatch call{buffers.data(),
                         sizes.data(),
                         MSL_MAX_BINDINGS,
                         state.threadgroup_bytes.data(),
                         MSL_MAX_BINDINGS,
                         {narrow(dispatch.groups.width), narrow(dispatch.groups.height), narrow(dispatch.groups.depth)},
                         {narrow(dispatch.threads.width), narrow(dispatch.threads.height),
                          narrow(dispatch.threads.depth)},
                         ++seed,
                         error,
                         sizeof(error)};
  require(kernel.run(&call) == 0, kernel.name, ": ", error);
  for (const Binding& binding : state.buffers) {
    DoubleBuffer* buffer = binding.buffer.get();
    require(buffer == nil || buffer->_memory.is_guard_intact(), kernel.name, " wrote past the end of a buffer of ",
            buffer == nil ? 0 : buffer->_memory.size(), " bytes");
  }
}

}  // namespace
}  // namespace metal_double

@implementation DoubleEncoder
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  check_encoder(self);
  require(state != nil, "the pipeline is nil");
  _state.pipeline = Ref(state);
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  check_encoder(self);
  require(index < MSL_MAX_BINDINGS, "buffer index ", index, "; the last is ", MSL_MAX_BINDINGS - 1);
  require(buffer == nil || offset < buffer.length, "offset ", offset, " is outside a buffer of ",
          buffer == nil ? 0 : buffer.length, " bytes");
  _state.buffers[index] = Binding{Ref(buffer), offset, {}};
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  check_encoder(self);
  require(index < MSL_MAX_BINDINGS, "buffer index ", index, "; the last is ", MSL_MAX_BINDINGS - 1);
  require(length > 0 && length <= kMaxSetBytes, "setBytes of ", length, " bytes; it takes 1 to ", kMaxSetBytes);
  const char* first = static_cast<const char*>(bytes);
  _state.buffers[index] = Binding{Ref(), 0, {first, first + length}};
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  check_encoder(self);
  require(index < MSL_MAX_BINDINGS, "threadgroup memory index ", index, "; the last is ", MSL_MAX_BINDINGS - 1);
  require(length % 16 == 0, length, " bytes of threadgroup memory: no multiple of 16");
  require(length <= kThreadgroupMemory, length, " bytes of threadgroup memory; there are ", kThreadgroupMemory);
  _state.threadgroup_bytes[index] = length;
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  check_encoder(self);
  check_dispatch(_state, groups, threads);
  waiting().push_back({_state, groups, threads});
}
- (void)memoryBarrierWithScope:(MTLBarrierScope)scope {
  check_encoder(self);
  require((scope & MTLBarrierScopeBuffers) != 0, "a barrier that orders no buffers");
}
- (void)endEncoding {
  fail("endEncoding on the stream's encoder, which other operators go on using");
}
@end

namespace metal_double {

void* new_buffer(size_t bytes) {
  DoubleBuffer* buffer = [DoubleBuffer new];
  buffer->_memory.allocate(bytes);
  return buffer;
}

void release_buffer(void* buffer) { [(DoubleBuffer*)buffer release]; }
char* buffer_contents(void* buffer) { return ((DoubleBuffer*)buffer)->_memory.data(); }
size_t buffer_bytes() { return live_bytes; }
void set_compiler(const std::string& command) { compiler_command = command; }
void set_max_threads(size_t threads) { max_threads = threads; }
size_t pending() { return waiting().size(); }
void reset() {
  max_threads = MSL_MAX_THREADS;
  waiting().clear();
  drain_pools();
}

void execute_pending() {
  while (!waiting().empty()) {
    Dispatch dispatch = std::move(waiting().front());
    waiting().pop_front();
    execute(dispatch);
  }
}

id<MTLComputeCommandEncoder> new_encoder() { return [DoubleEncoder new]; }

void end_encoder(id<MTLComputeCommandEncoder> encoder) {
  DoubleEncoder* ended = encoder;
  ended->_isEnded = true;
  ended->_state = State();
}

}  // namespace metal_double
