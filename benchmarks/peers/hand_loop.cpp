// What a loop written by hand for one case reaches: decode attention over codes of four bits, and nothing else.
//
// A row of head_dim / 2 bytes holds the indices of 16 levels, dimension d in the d-th four bits; a float32 norm for
// each row. Four query heads share a KV head. There is no rotation, mean, dense tail, mask or left padding, and the
// length is a multiple of kBlock. hand_loop.py compiles this for the instruction set that is wanted.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace {

constexpr int kGroup = 4;        // query heads of a KV head
constexpr int kBlock = 64;       // positions between two steps of the online softmax
constexpr int kPrefetch = 4096;  // bytes ahead
constexpr int kWordCodes = 8;    // codes in a word of 32 bits; vectors hold the same one of several words
constexpr float kLog2E = 1.44269504f;

#if defined(__AVX512F__)
using Floats = __m512;
using Words = __m512i;
constexpr int kStep = 4;  // vectors of one row's sum that are kept in registers for all four heads

// The levels that the lowest four bits of each word choose.
struct Levels {
  Floats all;
  explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}
  Floats of(Words w) const { return _mm512_permutexvar_ps(w, all); }
};
Floats load(const float* p) { return _mm512_load_ps(p); }
void store(float* p, Floats x) { _mm512_store_ps(p, x); }
Floats all(float x) { return _mm512_set1_ps(x); }
Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }
Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
Words shift_right(Words w, int bits) { return _mm512_srli_epi32(w, bits); }
Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
// 2^x for x <= 0.
Floats exp2_integer(Floats p, Floats n) { return _mm512_scalef_ps(p, n); }
Floats round(Floats x) { return _mm512_roundscale_ps(x, 0); }
// {p[0] four times, p[1] four times, ...}
Floats fourfold(const float* p) {
  const Words lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
// In each lane, the largest of the lanes that belong to the same head.
Floats largest_of_heads(Floats x) {
  x = larger(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return larger(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}
// In each 128 bits, sums of those of four vectors.
Floats in_lanes(const Floats (&x)[kGroup]) {
  const Floats low = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
  const Floats high = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
  const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
}
// The sums of the 128 bits of each vector, one after the other.
Floats sums_of(const Floats (&x)[4]) {
  const Floats first = _mm512_shuffle_f32x4(x[0], x[1], 0x88) + _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
  const Floats second = _mm512_shuffle_f32x4(x[2], x[3], 0x88) + _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
  return _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
}
#else
using Floats = __m256;
using Words = __m256i;
constexpr int kStep = 2;

struct Levels {
  Floats low, high;
  explicit Levels(const float* levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
  Floats of(Words w) const {
    const Floats is_high = _mm256_castsi256_ps(_mm256_slli_epi32(w, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, w), _mm256_permutevar8x32_ps(high, w), is_high);
  }
};
Floats load(const float* p) { return _mm256_load_ps(p); }
void store(float* p, Floats x) { _mm256_store_ps(p, x); }
Floats all(float x) { return _mm256_set1_ps(x); }
Floats larger(Floats x, Floats y) { return _mm256_max_ps(x, y); }
Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(p)); }
Words shift_right(Words w, int bits) { return _mm256_srli_epi32(w, bits); }
Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
Floats exp2_integer(Floats p, Floats n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Floats fourfold(const float* p) { return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])); }
Floats largest_of_heads(Floats x) { return larger(x, _mm256_permute2f128_ps(x, x, 1)); }
Floats in_lanes(const Floats (&x)[kGroup]) {
  return _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
}
Floats sums_of(const Floats (&x)[2]) {
  return _mm256_permute2f128_ps(x[0], x[1], 0x20) + _mm256_permute2f128_ps(x[0], x[1], 0x31);
}
#endif
constexpr int kWidth = sizeof(Floats) / sizeof(float);
constexpr int kChunk = kWidth * kWordCodes;  // dimensions in a vector of words
constexpr int kRows = kWidth / kGroup;       // positions whose four logits fill a vector

// 2^x for x <= 0, to about 2e-7.
Floats exp2_of(Floats x) {
  x = larger(x, all(-126.0f));
  const Floats n = round(x), f = x - n;
  Floats p = all(1.33336e-3f);
  for (float c : {9.61812e-3f, 5.55041e-2f, 2.402265e-1f, 6.931472e-1f, 1.0f}) p = multiply_add(p, f, all(c));
  return exp2_integer(p, n);
}

// Dimension d of a row is lane `d / 8 % kWidth` of the vector that takes the d % 8-th codes of its chunk's words.
constexpr int place(int d) { return d / kChunk * kChunk + d % kWordCodes * kWidth + d % kChunk / kWordCodes; }

struct Side {
  const uint8_t* codes;
  const float* norms;
};

template <int kDim>
struct Head {
  alignas(64) float q[kGroup][kDim];    // in the order of `place`, with the factors of the logits
  alignas(64) float sum[kGroup][kDim];  // of weighted values
  alignas(64) float weights[kBlock][kGroup];
  alignas(64) float most[kWidth];  // the largest logit of each head, repeated
  alignas(64) float total[kWidth];
  const Levels levels;

  explicit Head(const float* all_levels, const float* given) : levels(all_levels) {
    const float scale = kLog2E / std::sqrt(static_cast<float>(kDim));
    for (int h = 0; h < kGroup; ++h) {
      for (int d = 0; d < kDim; ++d) {
        q[h][place(d)] = given[h * kDim + d] * scale;
        sum[h][d] = 0;
      }
    }
    store(most, all(-INFINITY));
    store(total, all(0));
  }

  // weights = logits of the positions that `k` begins with.
  void logits(const Side& k) {
    for (int row = 0; row < kBlock; row += kRows) {
      Floats rows[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) rows[r] = products(k.codes + (row + r) * kDim / 2);
      store(weights[row], sums_of(rows) * fourfold(k.norms + row));
    }
  }

  // The products of a row with the four queries, to be summed up over the 128 bits.
  Floats products(const uint8_t* codes) const {
    Floats dot[kGroup] = {all(0), all(0), all(0), all(0)};
#pragma GCC unroll 4
    for (int chunk = 0; chunk < kDim; chunk += kChunk) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + chunk / 2) + kPrefetch, _MM_HINT_T0);
      const Words words = load_words(codes + chunk / 2);
#pragma GCC unroll 8
      for (int i = 0; i < kWordCodes; ++i) {
        const Floats x = levels.of(shift_right(words, 4 * i));
#pragma GCC unroll 4
        for (int h = 0; h < kGroup; ++h) dot[h] = multiply_add(x, load(&q[h][chunk + i * kWidth]), dot[h]);
      }
    }
    return in_lanes(dot);
  }

  // Logits become weights times the norms of the values; what was summed up is brought to the new largest logit.
  void softmax(const Side& v) {
    const Floats before = load(most);
    Floats largest = before;
    for (int row = 0; row < kBlock; row += kRows) largest = larger(largest, load(weights[row]));
    largest = largest_of_heads(largest);
    const Floats factor = exp2_of(before - largest);
    Floats added = all(0);
    for (int row = 0; row < kBlock; row += kRows) {
      const Floats weight = exp2_of(load(weights[row]) - largest);
      added = added + weight;
      store(weights[row], weight * fourfold(v.norms + row));
    }
    alignas(64) float old[kWidth], factors[kWidth];
    store(old, before);
    store(factors, factor);
    store(most, largest);
    store(total, multiply_add(load(total), factor, added));
    for (int h = 0; h < kGroup; ++h) {
      if (old[h] == most[h]) continue;
      for (int d = 0; d < kDim; d += kWidth) store(&sum[h][d], load(&sum[h][d]) * all(factors[h]));
    }
  }

  void values(const Side& v) {
    for (int chunk = 0; chunk < kDim; chunk += kChunk) {
#pragma GCC unroll 4
      for (int first = 0; first < kWordCodes; first += kStep) {
        Floats kept[kGroup][kStep];
        for (int h = 0; h < kGroup; ++h) {
          for (int i = 0; i < kStep; ++i) kept[h][i] = load(&sum[h][chunk + (first + i) * kWidth]);
        }
        for (int row = 0; row < kBlock; ++row) {
          const uint8_t* from = v.codes + (row * kDim + chunk) / 2;
          if (first == 0) _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetch, _MM_HINT_T0);
          const Words words = load_words(from);
#pragma GCC unroll 4
          for (int i = 0; i < kStep; ++i) {
            const Floats x = levels.of(shift_right(words, 4 * (first + i)));
#pragma GCC unroll 4
            for (int h = 0; h < kGroup; ++h) kept[h][i] = multiply_add(x, all(weights[row][h]), kept[h][i]);
          }
        }
        for (int h = 0; h < kGroup; ++h) {
          for (int i = 0; i < kStep; ++i) store(&sum[h][chunk + (first + i) * kWidth], kept[h][i]);
        }
      }
    }
  }

  void finish(float* out) const {
    for (int h = 0; h < kGroup; ++h) {
      float divisor = 0;
      for (int i = h; i < kWidth; i += kGroup) divisor += total[i];
      for (int d = 0; d < kDim; ++d) out[h * kDim + d] = sum[h][place(d)] / divisor;
    }
  }
};

template <int kDim>
void attend(int kv_heads, int64_t length, const float* levels, Side k, Side v, const float* q, float* out) {
#pragma omp parallel for schedule(static)
  for (int kv = 0; kv < kv_heads; ++kv) {
    Head<kDim> head(levels, q + kv * kGroup * kDim);
    for (int64_t begin = kv * length; begin < (kv + 1) * length; begin += kBlock) {
      const Side v_block{v.codes + begin * kDim / 2, v.norms + begin};
      head.logits({k.codes + begin * kDim / 2, k.norms + begin});
      head.softmax(v_block);
      head.values(v_block);
    }
    head.finish(out + kv * kGroup * kDim);
  }
}

}  // namespace

// codes [kv_heads, length, head_dim / 2], norms [kv_heads, length], levels [16], q and out [kv_heads, 4, head_dim].
extern "C" int hand_loop(int head_dim, int kv_heads, int64_t length, const float* levels, const uint8_t* k_codes,
                         const float* k_norms, const uint8_t* v_codes, const float* v_norms, const float* q,
                         float* out) {
  if (length % kBlock != 0) return 1;
  const Side k{k_codes, k_norms}, v{v_codes, v_norms};
  if (head_dim == 128) {
    attend<128>(kv_heads, length, levels, k, v, q, out);
  } else if (head_dim == 256) {
    attend<256>(kv_heads, length, levels, k, v, q, out);
  } else {
    return 1;
  }
  return 0;
}
