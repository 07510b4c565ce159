#if defined(__GNUC__) && !defined(__clang__)
// Of operands in GCC's own headers, which do not matter.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "prelude.h"

#if defined(__x86_64__)
#define TQ_ISA_AVX512
#define TQ_ISA_NAME "AVX512"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((                                                                         \
                                 target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma,f16c")
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
const Kernels& avx512_kernels() { return kTable; }
}  // namespace tqattn::cpu
#endif
