#include "prelude.h"

#if defined(__x86_64__)
#define TQ_ISA_AVX2
#define TQ_ISA_NAME "AVX2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace tqattn::cpu {
#include "kernels_impl.h"
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tqattn::cpu {
const Kernels& avx2_kernels() { return kTable; }
}  // namespace tqattn::cpu
#endif
