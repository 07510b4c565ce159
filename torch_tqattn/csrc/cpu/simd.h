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

// Whether four products of 8-bit integers are added to each lane in one instruction.
#if defined(TQ_ISA_AVX512)
#define TQ_HAS_DOT
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
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

// Makes the compiler load x into a register here, rather than at each of its uses.
TQ_INLINE void keep(FloatVec& x) {
#if defined(__aarch64__)
  asm("" : "+w"(x));
#elif defined(TQ_ISA_AVX512)
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
}

TQ_INLINE FloatVec max(FloatVec a, FloatVec b) { return a > b ? a : b; }

// kWidth numbers of any type.
TQ_INLINE FloatVec load_number(const float* p) { return load(p); }

TQ_INLINE FloatVec load_number(const c10::Half* p) {
#if defined(TQ_ISA_AVX512)
  return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(TQ_ISA_AVX2)
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (FloatVec)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
  typedef uint16_t ShortVec __attribute__((vector_size(kWidth * 2)));
  ShortVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  const IntVec bits = __builtin_convertvector(half, IntVec);
  const IntVec magnitude = (bits & 0x7fff) << 13, shifted = magnitude + (112 << 23);
  const IntVec subnormal = (IntVec)((FloatVec)(magnitude + (113 << 23)) - 0x1p-14f);
  const IntVec finite = magnitude < (1 << 23) ? subnormal : shifted;
  return (FloatVec)((magnitude < (31 << 23) ? finite : shifted + (112 << 23)) | (bits & 0x8000) << 16);
#endif
}

TQ_INLINE FloatVec load_number(const c10::BFloat16* p) {
#if defined(TQ_ISA_AVX512)
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (FloatVec)_mm512_slli_epi32(low, 16);
#endif
  typedef uint16_t ShortVec __attribute__((vector_size(kWidth * 2)));
  typedef uint32_t WordVec __attribute__((vector_size(kWidth * 4)));
  ShortVec high;
  __builtin_memcpy(&high, p, sizeof(high));
  return (FloatVec)(__builtin_convertvector(high, WordVec) << 16);
}

// kWidth numbers rounded to half precision, those beyond its range to infinity.
TQ_INLINE void store_half(c10::Half* p, FloatVec v) {
#if defined(TQ_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(TQ_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<__fp16*>(p), vcvt_f16_f32((float32x4_t)v));
#else
  typedef int16_t ShortVec __attribute__((vector_size(kWidth * 2)));
  const IntVec bits = (IntVec)v, magnitude = bits & 0x7fffffff;
  const IntVec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const IntVec subnormal = (IntVec)((FloatVec)magnitude + 0.5f) - 0x3f000000;  // adding rounds to multiples of 2^-24
  const IntVec special = magnitude > 0x7f800000 ? IntVec{} + 0x7e00 : IntVec{} + 0x7c00;
  const IntVec finite = magnitude < (113 << 23) ? subnormal : normal;
  const IntVec half = (magnitude < 0x47800000 ? finite : special) | ((bits >> 16) & 0x8000);
  const ShortVec narrow = __builtin_convertvector(half, ShortVec);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
#endif
}

TQ_INLINE void put(c10::Half* p, FloatVec v) { store_half(p, v); }

TQ_INLINE void put(float* p, FloatVec v) { store(p, v); }

// saturate_to_half
TQ_INLINE FloatVec saturate(FloatVec v) {
  const FloatVec magnitude = (FloatVec)((IntVec)v & 0x7fffffff);
  const FloatVec largest = (FloatVec)((IntVec)broadcast(TQ_HALF_MAX) | ((IntVec)v & INT32_MIN));
  const FloatVec finite = magnitude > TQ_HALF_MAX ? largest : v;
  return magnitude == INFINITY ? v : finite;
}

TQ_INLINE FloatVec square_root(FloatVec v) {
#if defined(TQ_ISA_AVX512)
  return (FloatVec)_mm512_sqrt_ps((__m512)v);
#elif defined(TQ_ISA_AVX2)
  return (FloatVec)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (FloatVec)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (FloatVec)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// e^r for |r| <= ln 2 / 2.
TQ_INLINE FloatVec exp_near_zero(FloatVec r) {
  FloatVec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// e^x for x <= 0; 0 below -87, where the result would leave float32's normal numbers. NaN stays NaN.
TQ_INLINE FloatVec exp_negative(FloatVec x) {
#if defined(TQ_ISA_AVX512)
  const __m512 given = (__m512)x;
  const __m512 exponent = _mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
  const FloatVec r = (x - (FloatVec)exponent * 0.693359375f) - (FloatVec)exponent * -2.12194440e-4f;
  const __mmask16 is_kept = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (FloatVec)_mm512_maskz_scalef_ps(is_kept, (__m512)exp_near_zero(r), exponent);
#else
  const FloatVec clamped = max(broadcast(-87.0f), x);  // this order of arguments keeps a NaN
  const FloatVec scaled = clamped * 1.44269504088896341f;
  // Adding 1.5 * 2^23 rounds to the nearest integer.
  const FloatVec shifted = scaled + 12582912.0f;
  const FloatVec whole = shifted - 12582912.0f;
  // The remainder times ln 2, in two parts so that it is exact to the last bit.
  const FloatVec r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  IntVec bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold the integer
  FloatVec power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? FloatVec{} : exp_near_zero(r) * power;
#endif
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
  // Each step halves the number of vectors: half of one and half of the other, plus the other halves in their places.
  // A blend costs less than a second shuffle.
  __m512 halves[8], quarters[4], eighths[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[i], b = (__m512)v[i + 8];
    halves[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  const __m512i other_lanes = _mm512_setr_epi64(2, 3, 8, 9, 6, 7, 12, 13);
  for (int i = 0; i < 4; ++i) {
    const __m512 a = halves[i], b = halves[i + 4];
    const __m512d others = _mm512_permutex2var_pd(_mm512_castps_pd(a), other_lanes, _mm512_castps_pd(b));
    quarters[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_castpd_ps(others));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarters[i], b = quarters[i + 2];
    const __m512d others = _mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), 0x55);
    eighths[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_castpd_ps(others));
  }
  const __m512 others = _mm512_permute_ps(_mm512_mask_blend_ps(0xaaaa, eighths[1], eighths[0]), 0xb1);
  store(sums, (FloatVec)_mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, eighths[0], eighths[1]), others));
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
