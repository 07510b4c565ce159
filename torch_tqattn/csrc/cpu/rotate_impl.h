// The signed Hadamard transform.
// Part of kernels_impl.h: compiled once for each instruction set.

// A row of up to this many vectors stays in registers.
#if defined(TQ_ISA_AVX512)
constexpr int kHeldVectors = 16;
#else
constexpr int kHeldVectors = 8;
#endif

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

// The stages among the lanes of a vector, for transforms of kCount numbers.
template <int kCount>
TQ_INLINE FloatVec hadamard_of_lanes(FloatVec v) {
  v = butterfly_of_lanes<1>(butterfly_of_lanes<0>(v));
  if constexpr (kCount > 4) v = butterfly_of_lanes<2>(v);
  if constexpr (kCount > 8) v = butterfly_of_lanes<3>(v);
  return v;
}

// log2(kRadix) stages among `count` vectors, from those that are `stride` apart on.
template <int kRadix>
TQ_INLINE void butterflies(FloatVec* x, int64_t count, int64_t stride) {
  for (int64_t group = 0; group < count; group += stride * kRadix) {
    for (int64_t first = group; first < group + stride; ++first) {
      FloatVec v[kRadix];
#pragma GCC unroll 16
      for (int i = 0; i < kRadix; ++i) v[i] = x[first + i * stride];
#pragma GCC unroll 4
      for (int apart = 1; apart < kRadix; apart *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kRadix; ++i) {
          if (i & apart) continue;
          const FloatVec a = v[i], b = v[i + apart];
          v[i] = a + b;
          v[i + apart] = a - b;
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRadix; ++i) x[first + i * stride] = v[i];
    }
  }
}

// The stages among the vectors of a power-of-two transform.
template <int kVectors>
TQ_INLINE void hadamard_of_vectors(FloatVec* x) {
  if constexpr (kVectors <= kHeldVectors) return butterflies<kVectors>(x, kVectors, 1);
  constexpr int kEighths = kVectors >= 64 ? 64 : 8;  // left apart by stages of eight
  butterflies<8>(x, kVectors, 1);
  if constexpr (kVectors >= 64) butterflies<8>(x, kVectors, 8);
  if constexpr (kVectors > kEighths) butterflies<kVectors / kEighths>(x, kVectors, kEighths);
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
void hadamard_of_parts(FloatVec* row) {
  static constexpr OddHadamard<kOrder> matrix;
  typedef float PartVec __attribute__((vector_size(kPart * 4)));
  constexpr int kTogether = 4;  // sums that do not wait for each other; divides both orders
  PartVec part[kOrder];
  __builtin_memcpy(part, row, sizeof(part));
  for (int to = 0; to < kOrder; to += kTogether) {
    PartVec total[kTogether] = {};
    for (int from = 0; from < kOrder; ++from) {
      for (int i = 0; i < kTogether; ++i) total[i] += matrix.entry[to + i][from] * part[from];
    }
    __builtin_memcpy(reinterpret_cast<float*>(row) + to * kPart, total, sizeof(total));
  }
}

// The parts of a row that the transform of an odd order mixes.
constexpr int hadamard_parts(int head_dim) { return head_dim == 80 ? 20 : head_dim % 3 == 0 ? 12 : 1; }

// A row of kHeadDim numbers.
template <int kHeadDim>
using RowVecs = FloatVec[kHeadDim / kWidth];

// H times the signed row, not normalised, of numbers of any type.
template <int kHeadDim, typename In>
TQ_INLINE void signed_hadamard(const In* in, bool has_signs, RowVecs<kHeadDim>& row) {
  constexpr int kParts = hadamard_parts(kHeadDim), kPart = kHeadDim / kParts;
#pragma GCC unroll 16
  for (int i = 0; i < kHeadDim / kWidth; ++i) {
    const FloatVec x = load_number(in + i * kWidth);
    row[i] = hadamard_of_lanes<kPart>(has_signs ? apply_signs(x, i * kWidth) : x);
  }
  if constexpr (kPart > kWidth) {
    for (int part = 0; part < kParts; ++part) hadamard_of_vectors<kPart / kWidth>(row + part * kPart / kWidth);
  }
  if constexpr (kParts > 1) hadamard_of_parts<kParts, kPart>(row);
}

template <int kHeadDim>
void rotate(const float* in, float* out, int64_t rows, bool inverse, float scale) {
  const float factor = scale / std::sqrt(static_cast<float>(kHeadDim));
  for (int64_t r = 0; r < rows; ++r, in += kHeadDim, out += kHeadDim) {
    RowVecs<kHeadDim> row;
    signed_hadamard<kHeadDim>(in, !inverse, row);
#pragma GCC unroll 16
    for (int i = 0; i < kHeadDim / kWidth; ++i) {
      const FloatVec x = row[i] * factor;
      store(out + i * kWidth, inverse ? apply_signs(x, i * kWidth) : x);
    }
  }
}

void rotate(const float* in, float* out, int64_t rows, int64_t head_dim, bool inverse, float scale) {
  switch (head_dim) {
#define CASE(dim) \
  case dim:       \
    return rotate<dim>(in, out, rows, inverse, scale);
    TQ_HEAD_DIMS(CASE)
#undef CASE
  }
}
