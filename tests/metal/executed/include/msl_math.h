// Mathematical functions, with exactly Metal's overloads: min(int, uint) is ambiguous here as it is there.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "../../functions.h"
#include "msl_vector.h"

namespace metal {

#define MSL_DEFINE_UNARY(name, value)                              \
  inline float name(float x) { return value; }                     \
  inline half name(half x) { return half(metal::name(float(x))); } \
  template <int N>                                                 \
  inline vec<float, N> name(vec<float, N> x) {                     \
    for (int i = 0; i < N; ++i) x[i] = metal::name(x[i]);          \
    return x;                                                      \
  }
#define MSL_DEFINE_BINARY(name, value)                                               \
  inline float name(float x, float y) { return value; }                              \
  inline half name(half x, half y) { return half(metal::name(float(x), float(y))); } \
  template <int N>                                                                   \
  inline vec<float, N> name(vec<float, N> x, vec<float, N> y) {                      \
    for (int i = 0; i < N; ++i) x[i] = metal::name(x[i], y[i]);                      \
    return x;                                                                        \
  }
#define MSL_DEFINE_TERNARY(name, value)                                                                \
  inline float name(float x, float y, float z) { return value; }                                       \
  inline half name(half x, half y, half z) { return half(metal::name(float(x), float(y), float(z))); } \
  template <int N>                                                                                     \
  inline vec<float, N> name(vec<float, N> x, vec<float, N> y, vec<float, N> z) {                       \
    for (int i = 0; i < N; ++i) x[i] = metal::name(x[i], y[i], z[i]);                                  \
    return x;                                                                                          \
  }
MSL_CHOSEN_UNARY(MSL_DEFINE_UNARY)
MSL_CHOSEN_BINARY(MSL_DEFINE_BINARY)
MSL_UNARY(MSL_DEFINE_UNARY)
MSL_BINARY(MSL_DEFINE_BINARY)
MSL_TERNARY(MSL_DEFINE_TERNARY)
#undef MSL_DEFINE_UNARY
#undef MSL_DEFINE_BINARY
#undef MSL_DEFINE_TERNARY

#define MSL_USING(name, value) using metal::name;
namespace precise {
MSL_CHOSEN_UNARY(MSL_USING)
MSL_CHOSEN_BINARY(MSL_USING)
}  // namespace precise
namespace fast {
MSL_CHOSEN_UNARY(MSL_USING)
MSL_CHOSEN_BINARY(MSL_USING)
}  // namespace fast
#undef MSL_USING

#define MSL_ORDER(T)                               \
  inline T min(T x, T y) { return y < x ? y : x; } \
  inline T max(T x, T y) { return x < y ? y : x; } \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
MSL_ORDER(char)
MSL_ORDER(uchar)
MSL_ORDER(short)
MSL_ORDER(ushort)
MSL_ORDER(int)
MSL_ORDER(uint)
MSL_ORDER(long)
MSL_ORDER(ulong)
MSL_ORDER(half)
#undef MSL_ORDER
// Of a number and a NaN, the number.
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
template <class T, int N>
inline vec<T, N> min(vec<T, N> x, vec<T, N> y) {
  for (int i = 0; i < N; ++i) x[i] = min(x[i], y[i]);
  return x;
}
template <class T, int N>
inline vec<T, N> max(vec<T, N> x, vec<T, N> y) {
  for (int i = 0; i < N; ++i) x[i] = max(x[i], y[i]);
  return x;
}

inline float abs(float x) { return std::fabs(x); }
inline half abs(half x) { return half(std::fabs(float(x))); }
inline short abs(short x) { return short(x < 0 ? -x : x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }

inline bool isnan(float x) { return std::isnan(x); }
inline bool isinf(float x) { return std::isinf(x); }
inline bool isfinite(float x) { return std::isfinite(x); }
inline bool isnan(half x) { return std::isnan(float(x)); }
inline bool isinf(half x) { return std::isinf(float(x)); }
inline bool isfinite(half x) { return std::isfinite(float(x)); }

template <class T, int N>
inline T dot(vec<T, N> x, vec<T, N> y) {
  T sum = x[0] * y[0];
  for (int i = 1; i < N; ++i) sum += x[i] * y[i];
  return sum;
}
template <class T>
inline T select(T x, T y, bool second) {
  return second ? y : x;
}

inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint clz(uint x) { return x == 0 ? 32u : uint(__builtin_clz(x)); }
inline uint ctz(uint x) { return x == 0 ? 32u : uint(__builtin_ctz(x)); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : uint((ulong(x) >> offset) & ((ulong(1) << bits) - 1));
}

}  // namespace metal
