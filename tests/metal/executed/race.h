// Data races, by the accesses that compiled shaders report (-fsanitize=thread, without its run-time library).
//
// Accesses to the same byte, one of them a write, must be ordered: made by one thread, or with a barrier for that
// memory between them that both threads pass. Simd functions order nothing, as in Metal. Between threadgroups of one
// dispatch nothing is ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace msl_race {

// Barriers passed so far, by memory: those of the threadgroup, and all. Each thread has its own.
enum Memory { kDevice, kThreadgroup, kMemories };
struct Clock {
  uint32_t threadgroup[kMemories], any[kMemories];
};

// Of the thread that runs.
struct Thread {
  uint32_t threadgroup;  // one more than its place in the dispatch
  uint32_t index;
  Clock clock;
};

void start(std::vector<std::string>* problems);
void stop();
// Accesses to a region are checked; those outside it but less than kGuard bytes away are errors.
constexpr size_t kGuard = 256;
void add_region(char* first, size_t bytes, Memory memory, const std::string& name);
// Threadgroup memory is not initialised when a threadgroup starts.
void start_threadgroup();
void run_thread(const Thread* thread);  // null: none

}  // namespace msl_race
