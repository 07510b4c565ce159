// The signed Hadamard transform.
// Part of kernels_impl.h: compiled once for each instruction set.

TQ_INLINE FloatVec load_number(const float* p) { return load(p); }

TQ_INLINE FloatVec load_number(const c10::Half* p) { return load_half(p); }

TQ_INLINE FloatVec load_number(const c10::BFloat16* p) {
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

// saturate_to_half
TQ_INLINE FloatVec saturate(FloatVec v) {
  const FloatVec magnitude = (FloatVec)((IntVec)v & 0x7fffffff);
  const FloatVec largest = (FloatVec)((IntVec)broadcast(TQ_HALF_MAX) | ((IntVec)v & INT32_MIN));
  const FloatVec finite = magnitude > TQ_HALF_MAX ? largest : v;
  return magnitude == INFINITY ? v : finite;
}

// What the transform negates: the sign bit of each coordinate.
struct SignBits {
  alignas(64) uint32_t bits[TQ_MAX_HEAD_DIM]{};
  constexpr SignBits() {
    for (int i = 0; i < TQ_MAX_HEAD_DIM; ++i) bits[i] = (kSignWords[i / 32] >> (i % 32) & 1) << 31;
  }
};

constexpr SignBits kSigns;

TQ_INLINE FloatVec apply_signs(FloatVec v, int64_t i) {
  IntVec signs;
  __builtin_memcpy(&signs, kSigns.bits + i, sizeof(signs));
  return (FloatVec)((IntVec)v ^ signs);
}

// Every lane's partner: the lane whose number differs in that bit.
template <int kBit>
TQ_INLINE FloatVec partners(FloatVec v) {
#if defined(TQ_ISA_AVX512)
  if constexpr (kBit < 2) return (FloatVec)_mm512_permute_ps((__m512)v, kBit == 0 ? 0xb1 : 0x4e);
  return (FloatVec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, kBit == 2 ? 0xb1 : 0x4e);
#elif defined(TQ_ISA_AVX2)
  if constexpr (kBit < 2) return (FloatVec)_mm256_permute_ps((__m256)v, kBit == 0 ? 0xb1 : 0x4e);
  return (FloatVec)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
#elif defined(__x86_64__)
  return (FloatVec)_mm_shuffle_ps((__m128)v, (__m128)v, kBit == 0 ? 0xb1 : 0x4e);
#elif defined(__aarch64__)
  if constexpr (kBit == 0) return (FloatVec)vrev64q_f32((float32x4_t)v);
  return (FloatVec)vextq_f32((float32x4_t)v, (float32x4_t)v, 2);
#else
  FloatVec swapped;
  for (int i = 0; i < kWidth; ++i) swapped[i] = v[i ^ (1 << kBit)];
  return swapped;
#endif
}

// Of each pair of partners the sum, where the bit is clear, and the difference.
template <int kBit>
TQ_INLINE FloatVec butterfly_of_lanes(FloatVec v) {
  if constexpr (1 << kBit < kWidth) {
    FloatVec sign;
    for (int i = 0; i < kWidth; ++i) sign[i] = i >> kBit & 1 ? -1.0f : 1.0f;
    return v * sign + partners<kBit>(v);
  }
  return v;
}

// The stages among the lanes of a vector, for transforms of `count` numbers.
TQ_INLINE FloatVec hadamard_of_lanes(FloatVec v, int64_t count) {
  v = butterfly_of_lanes<1>(butterfly_of_lanes<0>(v));
  if (count > 4) v = butterfly_of_lanes<2>(v);
  if (count > 8) v = butterfly_of_lanes<3>(v);
  return v;
}

// log2(kRadix) stages among `count` vectors, from those that are `stride` apart on.
template <int kRadix>
TQ_INLINE void butterflies(float* x, int64_t count, int64_t stride) {
  for (int64_t group = 0; group < count; group += stride * kRadix) {
    for (int64_t first = group; first < group + stride; ++first) {
      FloatVec v[kRadix];
      for (int i = 0; i < kRadix; ++i) v[i] = load(x + (first + i * stride) * kWidth);
      for (int apart = 1; apart < kRadix; apart *= 2) {
        for (int i = 0; i < kRadix; ++i) {
          if (i & apart) continue;
          const FloatVec a = v[i], b = v[i + apart];
          v[i] = a + b;
          v[i + apart] = a - b;
        }
      }
      for (int i = 0; i < kRadix; ++i) store(x + (first + i * stride) * kWidth, v[i]);
    }
  }
}

// The stages among a power-of-two number of vectors.
TQ_INLINE void hadamard_of_vectors(float* x, int64_t count) {
  int64_t stride = 1;
  for (; stride * 8 <= count; stride *= 8) butterflies<8>(x, count, stride);
  if (stride * 4 == count) butterflies<4>(x, count, stride);
  if (stride * 2 == count) butterflies<2>(x, count, stride);
}

// Signs of the symmetric Hadamard matrix of order 12 or 20: a border of ones around Legendre symbols of i + j.
template <int kOrder>
struct OddHadamard {
  float entry[kOrder][kOrder]{};
  constexpr OddHadamard() {
    const int q = kOrder - 1;
    for (int i = 0; i < kOrder; ++i) {
      for (int j = 0; j < kOrder; ++j) {
        float value = 1.0f;
        if (i > 0 && j > 0) {
          value = -1.0f;
          for (int root = 1; root < q; ++root) {
            if (root * root % q == (i + j - 2) % q) value = 1.0f;
          }
        }
        entry[i][j] = value;
      }
    }
  }
};

// The order-kOrder transform among as many parts of the row.
template <int kOrder, int kPart>
void hadamard_of_parts(float* row) {
  static constexpr OddHadamard<kOrder> matrix;
  typedef float PartVec __attribute__((vector_size(kPart * 4)));
  PartVec part[kOrder];
  __builtin_memcpy(part, row, sizeof(part));
  for (int to = 0; to < kOrder; ++to) {
    PartVec total = matrix.entry[to][0] * part[0];
    for (int from = 1; from < kOrder; ++from) total += matrix.entry[to][from] * part[from];
    __builtin_memcpy(row + to * kPart, &total, sizeof(total));
  }
}

// H times the row, not normalised. The stages among a vector's lanes are done already.
TQ_INLINE void hadamard_after_lanes(float* row, int64_t head_dim, int64_t part) {
  if (part > kWidth) {
    for (int64_t begin = 0; begin < head_dim; begin += part) hadamard_of_vectors(row + begin, part / kWidth);
  }
  if (head_dim == 80) hadamard_of_parts<20, 4>(row);
  if (head_dim == 96) hadamard_of_parts<12, 8>(row);
  if (head_dim == 192) hadamard_of_parts<12, 16>(row);
}

// The numbers of a part of the row that the power-of-two transform mixes.
int64_t part_size(int64_t head_dim) {
  return head_dim == 80 ? head_dim / 20 : head_dim % 3 == 0 ? head_dim / 12 : head_dim;
}

void rotate(const float* in, float* out, int64_t rows, int64_t head_dim, bool inverse, float scale) {
  const int64_t part = part_size(head_dim);
  const float factor = scale / std::sqrt(static_cast<float>(head_dim));
  alignas(64) float row[TQ_MAX_HEAD_DIM];
  for (int64_t r = 0; r < rows; ++r, in += head_dim, out += head_dim) {
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      const FloatVec x = load(in + i);
      store(row + i, hadamard_of_lanes(inverse ? x : apply_signs(x, i), part));
    }
    hadamard_after_lanes(row, head_dim, part);
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      const FloatVec x = load(row + i) * factor;
      store(out + i, inverse ? apply_signs(x, i) : x);
    }
  }
}
