// What the parts of the double tell each other. Plain C++: the part that gives ATen a device is no Objective-C.
#pragma once

#include <cstddef>
#include <map>
#include <string>

namespace metal_double {

// Raises the error that a mistake on the other side of the interface deserves.
[[noreturn]] void fail(const std::string& message);

// Objects that are alive, by class.
std::map<std::string, long> live_objects();

// Buffers, as torch's allocator sees them: an owned id<MTLBuffer> each.
void* new_buffer(size_t bytes);
void release_buffer(void* buffer);
char* buffer_contents(void* buffer);
size_t buffer_bytes();  // of all buffers alive

// Compiles a source: `command` -Dname=value... < source has to print a library's path, or fail with its complaints.
void set_compiler(const std::string& command);
// What each pipeline says of itself: fewer than 1024 is what a real one does when its kernel needs many registers.
void set_max_threads(size_t threads);

bool is_on_queue();  // this thread is inside dispatch_sync
size_t pending();    // dispatches that wait to be executed
void synchronize();  // executes them

// After a mistake that was made on purpose: forgets what waits to be executed, the pools that an exception left behind,
// and set_max_threads.
void reset();
void drain_pools();

}  // namespace metal_double
