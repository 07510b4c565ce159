// What the shaders need of Metal's standard library, for NVRTC. scripts/cuda_source.py puts it before a shader, which
// is compiled inside namespace metal, so that these names win over CUDA's own. A simdgroup is a warp, a threadgroup a
// block. No header is at hand while a program runs, so this includes none.
#pragma once

#define __METAL_VERSION__ 310

#define INFINITY __int_as_float(0x7F800000)
#define NAN __int_as_float(0x7FC00000)

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using int16_t = short;
using uint32_t = unsigned int;

struct half {
  half() = default;
  explicit half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  explicit operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
  ushort bits;
};

struct bfloat {
  bfloat() = default;
  explicit bfloat(float x) {  // rounded to nearest even; the instruction for it is younger than some GPUs
    const uint word = __float_as_uint(x);
    bits = x != x ? 0x7FC0 : ushort((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float(uint(bits) << 16); }
  ushort bits;
};

inline int min(int x, int y) { return y < x ? y : x; }
inline int max(int x, int y) { return x < y ? y : x; }
inline int clamp(int x, int low, int high) { return min(max(x, low), high); }
inline uint min(uint x, uint y) { return y < x ? y : x; }
inline uint max(uint x, uint y) { return x < y ? y : x; }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
inline float abs(float x) { return fabsf(x); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }

template <class To, class From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From));
  union Bits {
    Bits() {}
    From from;
    To to;
  } bits;
  bits.from = x;
  return bits.to;
}

namespace fast {
inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace fast

namespace precise {
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float tanh(float x) { return tanhf(x); }
}  // namespace precise

enum class mem_flags : uint { mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags x, mem_flags y) { return mem_flags(uint(x) | uint(y)); }

inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

// All lanes of a warp call these together.
template <class T>
inline T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(0xFFFFFFFFu, x, lane);
}
template <class T>
inline T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}

inline bool simd_any(bool x) { return __any_sync(0xFFFFFFFFu, x); }

}  // namespace metal

// Metal's keywords. After this, only a shader may follow.
#define device
#define constant const
#define thread
#define threadgroup
