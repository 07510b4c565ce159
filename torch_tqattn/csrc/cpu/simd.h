// Vectors of floats for one instruction set. Included inside that instruction set's target region and namespace:
// TQ_ISA_AVX512, TQ_ISA_AVX2 or neither (compiler vectors of 16 bytes, which are SSE2 or NEON) says which.
//
// Arithmetic is the compiler's own (GCC and clang vector extensions); only what they lack is spelled in intrinsics.

#if defined(TQ_ISA_AVX512)
constexpr int kWidth = 16;
#elif defined(TQ_ISA_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float FloatVec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

#define TQ_INLINE inline __attribute__((always_inline))

TQ_INLINE FloatVec load(const float* p) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

TQ_INLINE void store(float* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof(v)); }

TQ_INLINE FloatVec broadcast(float x) { return x - FloatVec{}; }

TQ_INLINE FloatVec max(FloatVec a, FloatVec b) { return a > b ? a : b; }

// kWidth half-precision numbers.
TQ_INLINE FloatVec load_half(const c10::Half* p) {
#if defined(TQ_ISA_AVX512)
  return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(TQ_ISA_AVX2)
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (FloatVec)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
  FloatVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// e^x for x <= 0; 0 below -87, where the result would leave float32's normal numbers. NaN stays NaN.
TQ_INLINE FloatVec exp_negative(FloatVec x) {
  const FloatVec clamped = max(broadcast(-87.0f), x);  // this order of arguments keeps a NaN
  const FloatVec scaled = clamped * 1.44269504088896341f;
  // Adding 1.5 * 2^23 rounds to the nearest integer.
  const FloatVec shifted = scaled + 12582912.0f;
  const FloatVec whole = shifted - 12582912.0f;
  // The remainder times ln 2, in two parts so that it is exact to the last bit.
  const FloatVec r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  FloatVec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold the integer
  FloatVec power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? FloatVec{} : p * power;
}

TQ_INLINE float sum_lanes(FloatVec v) {
#if defined(TQ_ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float lanes[kWidth];
  store(lanes, v);
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += lanes[i];
  return total;
}

TQ_INLINE float max_lanes(FloatVec v) {
#if defined(TQ_ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float lanes[kWidth];
  store(lanes, v);
  float largest = lanes[0];
  for (int i = 1; i < kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// Sums of the lanes of 16 vectors.
TQ_INLINE void sum_lanes_of_16(const FloatVec* v, float* sums) {
#if defined(TQ_ISA_AVX512)
  __m512 pairs[8], quads[4], octets[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    octets[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  }
  store(sums, (FloatVec)_mm512_add_ps(_mm512_shuffle_f32x4(octets[0], octets[1], 0x88),
                                      _mm512_shuffle_f32x4(octets[0], octets[1], 0xdd)));
#elif defined(TQ_ISA_AVX2)
  for (int i = 0; i < 16; i += 4) {
    const __m256 ab = _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]);
    const __m256 cd = _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
#elif defined(__aarch64__)
  for (int i = 0; i < 16; i += 4) {
    const float32x4_t ab = vpaddq_f32((float32x4_t)v[i], (float32x4_t)v[i + 1]);
    const float32x4_t cd = vpaddq_f32((float32x4_t)v[i + 2], (float32x4_t)v[i + 3]);
    vst1q_f32(sums + i, vpaddq_f32(ab, cd));
  }
#else
  for (int i = 0; i < 16; ++i) sums[i] = sum_lanes(v[i]);
#endif
}

// A codebook, laid out for look_up.
struct LevelTable {
  alignas(64) float levels[64];  // codebooks of up to 6 bits, repeated to fill the table
  const Codebook* codebook;
};

TQ_INLINE FloatVec look_up(const LevelTable& table, const uint8_t* codes, [[maybe_unused]] int bits) {
#if defined(TQ_ISA_AVX512)
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const float* levels = table.levels;
  if (bits <= 4) return (FloatVec)_mm512_permutexvar_ps(index, _mm512_load_ps(levels));
  if (bits == 5) {
    return (FloatVec)_mm512_permutex2var_ps(_mm512_load_ps(levels), index, _mm512_load_ps(levels + 16));
  }
  if (bits == 6) {
    const __m512 low = _mm512_permutex2var_ps(_mm512_load_ps(levels), index, _mm512_load_ps(levels + 16));
    const __m512 high = _mm512_permutex2var_ps(_mm512_load_ps(levels + 32), index, _mm512_load_ps(levels + 48));
    return (FloatVec)_mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
  }
#elif defined(TQ_ISA_AVX2)
  const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const float* levels = table.levels;
  if (bits <= 4) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(levels), index);
    if (bits <= 3) return (FloatVec)low;
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(levels + 8), index);
    // blendv chooses by the sign bit: bit 3 of the code is shifted there.
    return (FloatVec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
  return (FloatVec)_mm256_i32gather_ps(table.codebook->levels, index, 4);
#endif
  FloatVec v;
  const float* all = table.codebook->levels;
  for (int i = 0; i < kWidth; ++i) v[i] = all[codes[i]];
  return v;
}

#if defined(TQ_ISA_AVX512)
// 32 levels of 8-bit codes: four look-ups among 64 16-bit integers each, chosen by the code's high bits.
TQ_INLINE __m512i look_up_integers(const int16_t* integers, const uint8_t* codes) {
  const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  __m512i quarter[4];
  for (int i = 0; i < 4; ++i) {
    quarter[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(integers + 64 * i), index,
                                           _mm512_loadu_si512(integers + 64 * i + 32));
  }
  const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
                                 _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
}
#endif
