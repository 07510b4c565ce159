// Functions: one overload for each type, as in Metal, and no templates, so that exp(int) is ambiguous.
#pragma once

#include "../../functions.h"
#include "msl_types.h"

#define MSL_T half
#include "msl_float_functions.h"
#define MSL_T half2
#include "msl_float_functions.h"
#define MSL_T half3
#include "msl_float_functions.h"
#define MSL_T half4
#include "msl_float_functions.h"
#define MSL_T float
#include "msl_float_functions.h"
#define MSL_T float2
#include "msl_float_functions.h"
#define MSL_T float3
#include "msl_float_functions.h"
#define MSL_T float4
#include "msl_float_functions.h"

namespace metal {

#define MSL_WITH_VECTORS(X, T) X(T) X(T##2) X(T##3) X(T##4)
#define MSL_FLOATS(X) MSL_WITH_VECTORS(X, half) MSL_WITH_VECTORS(X, float)
#define MSL_BYTES(X) MSL_WITH_VECTORS(X, char) MSL_WITH_VECTORS(X, uchar)
#define MSL_SHORTS(X) MSL_WITH_VECTORS(X, short) MSL_WITH_VECTORS(X, ushort)
#define MSL_INTS(X) MSL_WITH_VECTORS(X, int) MSL_WITH_VECTORS(X, uint)
#define MSL_SMALL_INTEGERS(X) MSL_BYTES(X) MSL_SHORTS(X) MSL_INTS(X)
#define MSL_INTEGERS(X) MSL_SMALL_INTEGERS(X) MSL_WITH_VECTORS(X, long) MSL_WITH_VECTORS(X, ulong)

#define MSL_ORDER(T) \
  T min(T, T);       \
  T max(T, T);       \
  T clamp(T, T, T);  \
  T abs(T);
MSL_FLOATS(MSL_ORDER)
MSL_INTEGERS(MSL_ORDER)

#define MSL_BITS(T)              \
  T popcount(T);                 \
  T clz(T);                      \
  T ctz(T);                      \
  T reverse_bits(T);             \
  T rotate(T, T);                \
  T mulhi(T, T);                 \
  T extract_bits(T, uint, uint); \
  T insert_bits(T, T, uint, uint);
MSL_INTEGERS(MSL_BITS)

#define MSL_CLASSIFICATION(T, N) \
  bool##N isnan(T##N);           \
  bool##N isinf(T##N);           \
  bool##N isfinite(T##N);
#define MSL_CLASSIFICATIONS(T) \
  MSL_CLASSIFICATION(T, ) MSL_CLASSIFICATION(T, 2) MSL_CLASSIFICATION(T, 3) MSL_CLASSIFICATION(T, 4)
MSL_CLASSIFICATIONS(half)
MSL_CLASSIFICATIONS(float)

#define MSL_SELECT(T) T select(T, T, bool);
MSL_FLOATS(MSL_SELECT)
MSL_INTEGERS(MSL_SELECT)

#define MSL_DOT(T)   \
  T dot(T##2, T##2); \
  T dot(T##3, T##3); \
  T dot(T##4, T##4);
MSL_DOT(half)
MSL_DOT(float)

bool any(bool2);
bool any(bool3);
bool any(bool4);
bool all(bool2);
bool all(bool3);
bool all(bool4);

// Functions of a simdgroup. There are none for 64-bit integers, bool and bfloat.
#define MSL_REDUCTION(T)          \
  T simd_sum(T);                  \
  T simd_product(T);              \
  T simd_max(T);                  \
  T simd_min(T);                  \
  T simd_prefix_inclusive_sum(T); \
  T simd_prefix_exclusive_sum(T);
MSL_FLOATS(MSL_REDUCTION)
MSL_SMALL_INTEGERS(MSL_REDUCTION)

#define MSL_BIT_REDUCTION(T) \
  T simd_and(T);             \
  T simd_or(T);              \
  T simd_xor(T);
MSL_SMALL_INTEGERS(MSL_BIT_REDUCTION)

#define MSL_SHUFFLE(T)            \
  T simd_shuffle(T, ushort);      \
  T simd_shuffle_xor(T, ushort);  \
  T simd_shuffle_up(T, ushort);   \
  T simd_shuffle_down(T, ushort); \
  T simd_broadcast(T, ushort);    \
  T simd_broadcast_first(T);
MSL_FLOATS(MSL_SHUFFLE)
MSL_SMALL_INTEGERS(MSL_SHUFFLE)

bool simd_all(bool);
bool simd_any(bool);

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#undef MSL_WITH_VECTORS
#undef MSL_FLOATS
#undef MSL_SMALL_INTEGERS
#undef MSL_INTEGERS

}  // namespace metal
