// What compiled shaders call: threads of a threadgroup are fibers that meet at barriers and simd functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernel_abi.h"

namespace msl_runtime {

// Where a shader calls a function at which threads meet.
struct Site {
  const char* function;
  const char* file;
  int line;
};

// The index of each kind of argument in run-time tables, in the words of MSL's attributes.
enum class Builtin {
  kThreadPositionInGrid,
  kThreadPositionInThreadgroup,
  kThreadgroupPositionInGrid,
  kThreadsPerThreadgroup,
  kThreadgroupsPerGrid,
  kThreadsPerGrid,
  kThreadIndexInThreadgroup,
  kThreadIndexInSimdgroup,
  kSimdgroupIndexInThreadgroup,
  kSimdgroupsPerThreadgroup,
  kThreadsPerSimdgroup,
};

struct Index3 {
  uint32_t v[3];
};

// Called once all lanes have arrived, with what each passed; null for lanes that the threadgroup does not have.
using Combine = void (*)(void* const* lanes);

void exchange(void* mine, Combine combine, Site site);
void barrier(bool is_threadgroup, uint32_t memory, Site site);
uint32_t lane();
[[noreturn]] void fail(Site site, const char* problem);

// A random permutation of 0 to count - 1.
void shuffle(uint32_t* order, uint32_t count);

void* buffer(uint32_t index);
void* threadgroup_memory(uint32_t index);
void* threadgroup_variable(uint32_t index, const char* name, size_t bytes);
Index3 builtin(Builtin which);

int run(const MslKernel& kernel, void (*entry)(), const MslDispatch& dispatch);

}  // namespace msl_runtime
