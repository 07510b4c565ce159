// Everything the kernels include, before any instruction set is switched on: a standard function compiled for AVX-512
// could otherwise be the copy that the linker keeps for everybody.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

// A lambda that must take on its caller's instruction set.
#if defined(__clang__)
#define TQ_LAMBDA_INLINE
#else
#define TQ_LAMBDA_INLINE __attribute__((always_inline))
#endif
