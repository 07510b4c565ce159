// torch's MPS stream and device, and the serial queue they belong to: the symbols that an extension links with.
#include <ATen/mps/MPSDevice.h>
#include <ATen/mps/MPSStream.h>

#include <mutex>

#include "double.h"
#include "metal.h"

@interface DoubleDispatchQueue : NSObject <OS_dispatch_queue>
@end

@implementation DoubleDispatchQueue
@end

namespace {

thread_local bool on_queue = false;

std::mutex& queue_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

}  // namespace

extern "C" void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block) {
  if (queue == nil) metal_double::fail("dispatch_sync on a nil queue");
  if (on_queue) metal_double::fail("dispatch_sync on a queue from within it: a deadlock");
  const std::lock_guard<std::mutex> lock(queue_mutex());
  on_queue = true;
  std::string escaped;
  try {
    block();
  } catch (const std::exception& error) {
    escaped = error.what();
  }
  on_queue = false;
  if (!escaped.empty()) metal_double::fail("a C++ exception left a block under dispatch_sync: " + escaped);
}

namespace at::mps {

MPSDevice* MPSDevice::_device = nullptr;
MPSDevice::MPSDevice() : _mtl_device([DoubleDevice shared]) {}
MPSDevice::~MPSDevice() = default;

MPSDevice* MPSDevice::getInstance() {
  static auto* device = new MPSDevice();
  return device;
}

unsigned MPSDevice::getCoreCount() const { return 8; }

MPSStream::MPSStream(Stream stream)
    : _stream(stream), _commandQueue([DoubleCommandQueue new]), _serialQueue([DoubleDispatchQueue new]) {}
MPSStream::~MPSStream() = default;

id<MTLDevice> MPSStream::device() const { return [DoubleDevice shared]; }

id<MTLComputeCommandEncoder> MPSStream::commandEncoder() {
  if (!metal_double::is_on_queue()) metal_double::fail("the encoder was fetched outside the stream's queue");
  if (_commandEncoder == nil) _commandEncoder = metal_double::new_encoder();
  return _commandEncoder;
}

void MPSStream::endKernelCoalescing() {
  if (_commandEncoder == nil) return;
  metal_double::end_encoder(_commandEncoder);
  [_commandEncoder release];
  _commandEncoder = nil;
}

// torch's own ways here do not lead through these.
void MPSStream::synchronize(SyncType) { metal_double::fail("an operator synchronised the stream"); }
MPSCommandBuffer* MPSStream::commandBuffer() { metal_double::fail("an operator asked for torch's command buffer"); }

MPSStream* getDefaultMPSStream() {
  static auto* stream = new MPSStream(Stream(Stream::UNSAFE, Device(kMPS, 0), 0));
  return stream;
}

MPSStream* getCurrentMPSStream() { return getDefaultMPSStream(); }

}  // namespace at::mps

namespace metal_double {

bool is_on_queue() { return on_queue; }

void synchronize() {
  if (on_queue) fail("the stream is synchronised from within its queue: a deadlock");
  const std::lock_guard<std::mutex> lock(queue_mutex());
  at::mps::getDefaultMPSStream()->endKernelCoalescing();
  execute_pending();
}

}  // namespace metal_double
