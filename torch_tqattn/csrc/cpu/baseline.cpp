// The kernels without a particular instruction set: SSE2 on x86-64, NEON on arm64.
#include "prelude.h"

#if defined(__aarch64__)
#define TQ_ISA_NAME "NEON"
#else
#define TQ_ISA_NAME "baseline"
#endif

namespace tqattn::cpu {
#include "kernels_impl.h"

const Kernels& baseline_kernels() { return kTable; }
}  // namespace tqattn::cpu
