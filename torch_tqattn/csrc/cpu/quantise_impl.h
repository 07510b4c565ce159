// From numbers to codes.
// Part of kernels_impl.h: compiled once for each instruction set.

#include "../../shaders/guess.h"  // for vectors, by this instruction set

// table[index % kEntries], where kEntries is a power of two, and at least a vector's width.
template <int kEntries>
TQ_INLINE FloatVec pick(const float* table, IntVec index) {
#if defined(TQ_ISA_AVX512)
  const __m512i i = (__m512i)index;
  if constexpr (kEntries == 16) {
    return (FloatVec)_mm512_permutexvar_ps(i, _mm512_load_ps(table));
  } else if constexpr (kEntries == 32) {
    return (FloatVec)_mm512_permutex2var_ps(_mm512_load_ps(table), i, _mm512_load_ps(table + 16));
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(kEntries / 2));
    return (FloatVec)_mm512_mask_blend_ps(upper, (__m512)pick<kEntries / 2>(table, index),
                                          (__m512)pick<kEntries / 2>(table + kEntries / 2, index));
  }
#elif defined(TQ_ISA_AVX2)
  const __m256i i = (__m256i)index;
  if constexpr (kEntries == 8) {
    return (FloatVec)_mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  } else if constexpr (kEntries <= 32) {
    constexpr int kShift = kEntries == 16 ? 28 : 27;  // to the sign bit, by which blendv chooses
    return (FloatVec)_mm256_blendv_ps((__m256)pick<kEntries / 2>(table, index),
                                      (__m256)pick<kEntries / 2>(table + kEntries / 2, index),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(i, kShift)));
  } else {
    return (FloatVec)_mm256_i32gather_ps(table, _mm256_and_si256(i, _mm256_set1_epi32(kEntries - 1)), 4);
  }
#else
  FloatVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = table[index[i] & (kEntries - 1)];
  return v;
#endif
}

#if defined(TQ_ISA_AVX512)
// table[index % 256] * 2^16: half as many look-ups as for float32.
TQ_INLINE __m512i pick_integer(const int16_t* table, __m512i index) {
  __m512i quarter[4];
  for (int i = 0; i < 4; ++i) {
    quarter[i] =
        _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64 * i), index, _mm512_loadu_si512(table + 64 * i + 32));
  }
  const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  const __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
  const __m512i low = _mm512_mask_blend_epi32(bit6, quarter[0], quarter[1]);
  const __m512i high = _mm512_mask_blend_epi32(bit6, quarter[2], quarter[3]);
  return _mm512_slli_epi32(_mm512_mask_blend_epi32(bit7, low, high), 16);
}
#endif

// The number from -limit to limit that is nearest to x.
TQ_INLINE FloatVec clamp(FloatVec x, float limit) {
  const FloatVec high = broadcast(limit);
#if defined(TQ_ISA_AVX512)
  constexpr int kSmallerWithSignOfFirst = 2;
  return (FloatVec)_mm512_range_ps((__m512)x, (__m512)high, kSmallerWithSignOfFirst);
#endif
  const FloatVec below = x < high ? x : high;
  return below > -high ? below : -high;
}

// A codebook as its encoder reads it.
template <int kBits>
class Quantiser {
 public:
  explicit Quantiser(const Codebook& codebook) {
    constexpr int kLast = (1 << kBits) - 1;
    for (int i = 0; i < kEntries; ++i) {
      const int code = i & kLast;
      thresholds_[i] = codebook.thresholds[code < kLast ? code : 0];
      levels_[i] = codebook.levels[code];
      squares_[i] = levels_[i] * levels_[i];
    }
    largest_ = codebook.thresholds[kLast - 1];
    integers_ = codebook.integers;
    scale_ = codebook.scale / 65536;
  }

  // Codes, in the low byte of each lane: how many thresholds each number is beyond.
  TQ_INLINE IntVec code(FloatVec x) const {
    // Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
    const FloatVec shifted = tq_guess<kBits>(clamp(x, largest_)) + (12582912.0f + (1 << (kBits - 1)) - 1);
    const IntVec index = (IntVec)shifted;
    // The sign of a difference: fewer of the instructions that multiplications have to wait for than a comparison.
    return index - ((IntVec)(pick<kEntries>(thresholds_, index) - x) >> 31);
  }

  TQ_INLINE FloatVec level(IntVec code) const {
#if defined(TQ_ISA_AVX512)
    if constexpr (kBits == 8) {
      if (integers_ != nullptr) return (FloatVec)_mm512_cvtepi32_ps(pick_integer(integers_, (__m512i)code)) * scale_;
    }
#endif
    return pick<kEntries>(levels_, code);
  }

  // Of the level.
  TQ_INLINE FloatVec square(IntVec code) const {
    if constexpr (kBits == 8) return level(code) * level(code);  // which integers may be faster for
    return pick<kEntries>(squares_, code);
  }

 private:
  static constexpr int kEntries = kBits <= 3 && kWidth == 8 ? 8 : kBits <= 4 ? 16 : 1 << kBits;
  alignas(64) float thresholds_[kEntries];
  alignas(64) float levels_[kEntries];
  alignas(64) float squares_[kEntries];
  float largest_;
  const int16_t* integers_;
  float scale_;  // of integers times 2^16
};

// The low byte of each lane.
TQ_INLINE void store_bytes(uint8_t* p, IntVec v) {
#if defined(TQ_ISA_AVX512)
  // A conversion would be two instructions.
  const __m512i low_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_castsi512_si128(_mm512_permutexvar_epi8(low_bytes, (__m512i)v)));
#elif defined(TQ_ISA_AVX2)
  const __m256i low_bytes = _mm256_set1_epi32(0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, low_bytes);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), all);
#else
  typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
#endif
}

// Writes the codes of x * scale; returns the squares of their levels, summed lane by lane.
template <int kBits>
TQ_INLINE FloatVec quantise(const Quantiser<kBits>& quantiser, const float* x, int64_t size, float scale,
                            uint8_t* codes) {
  FloatVec squares = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    const IntVec code = quantiser.code(load(x + i) * scale);
    squares += quantiser.square(code);
    store_bytes(codes + i, code);
  }
  return squares;
}

// The multiplier of the scale with which the codes of x * inverse make the smallest angle with it; of equal ones the
// first.
template <int kBits>
float best_multiplier(const Quantiser<kBits>& quantiser, const float* x, int64_t size, float inverse) {
  float best = 1.0f, least = INFINITY;
  for (const float multiplier : kScaleMultipliers) {
    // The squared length of x's part at right angles to its codes: that of what quantising at this scale left over,
    // less what another scale would still take off it. From x itself, float32 would lose the difference at 8 bits.
    const float scale = 1.0f / multiplier;
    FloatVec left = {}, along = {}, length = {};
    for (int64_t i = 0; i < size; i += kWidth) {
      const FloatVec number = load(x + i) * inverse, level = quantiser.level(quantiser.code(number * scale));
      const FloatVec rest = number - level * multiplier;
      left += rest * rest;
      along += rest * level;
      length += level * level;
    }
    const float error = sum_lanes(left) - sum_lanes(along) * sum_lanes(along) / sum_lanes(length);
    if (error < least) {
      best = multiplier;
      least = error;
    }
  }
  return best;
}
