// The CPU kernels for one instruction set: included once by each of baseline.cpp, avx2.cpp and avx512.cpp.
//
// Attention walks the positions in tiles. A tile's keys (then values) are decoded once into a small dense buffer, with
// their norms and block means, and every query that shares the KV head uses it: plain dense attention on a tile that
// stays in the first-level cache.

namespace {

#include "simd.h"

constexpr int kMaxTile = 64;
constexpr int kPrefetchBytes = 4096;  // how far ahead rows are fetched into the cache
constexpr int kTileFloats = 8192;     // 32 KiB: positions a tile times head_dim

int64_t tile_positions(int64_t head_dim) {
  const int64_t fit = kTileFloats / head_dim / 16 * 16;
  return fit < kMaxTile ? fit : kMaxTile;
}

// Rotation

// Hadamard transform of a power-of-two number of elements, not normalised. Every stage has the same access pattern
// (neighbours in, halves out), which vectorises at all strides; after log2(count) stages the order is natural again.
// Returns the buffer that holds the result.
float* hadamard_power_of_two(float* from, float* to, int64_t count) {
  for (int64_t stage = 1; stage < count; stage *= 2) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = from[2 * i], b = from[2 * i + 1];
      to[i] = a + b;
      to[i + half] = a - b;
    }
    float* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

// Signs of the symmetric Hadamard matrix of order 12 or 20: a border of ones around Legendre symbols of i + j.
struct OddHadamard {
  float entry[20][20];
  explicit OddHadamard(int order) {
    const int q = order - 1;
    for (int i = 0; i < order; ++i) {
      for (int j = 0; j < order; ++j) {
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

int odd_order(int64_t head_dim) { return head_dim == 80 ? 20 : head_dim % 3 == 0 ? 12 : 1; }

void apply_signs(float* row, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; ++i) {
    row[i] = (kSignWords[i / 32] >> (i % 32)) & 1 ? -row[i] : row[i];
  }
}

void rotate(const float* in, float* out, int64_t rows, int64_t head_dim, bool inverse, float scale) {
  static const OddHadamard order12(12), order20(20);
  alignas(64) float buffers[2][TQ_MAX_HEAD_DIM];
  const int odd = odd_order(head_dim);
  const int64_t part = head_dim / odd;
  const float factor = scale / std::sqrt(static_cast<float>(head_dim));
  for (int64_t r = 0; r < rows; ++r) {
    float* row = buffers[0];
    std::memcpy(row, in + r * head_dim, head_dim * sizeof(float));
    if (!inverse) apply_signs(row, head_dim);
    if (odd == 1) {
      row = hadamard_power_of_two(buffers[0], buffers[1], head_dim);
    } else {
      const float (*matrix)[20] = odd == 12 ? order12.entry : order20.entry;
      const float* parts[20];
      for (int p = 0; p < odd; ++p) {
        parts[p] = hadamard_power_of_two(buffers[0] + p * part, buffers[1] + p * part, part);
      }
      alignas(64) float mixed[TQ_MAX_HEAD_DIM];
      for (int p = 0; p < odd; ++p) {
        for (int64_t i = 0; i < part; ++i) {
          float total = 0;
          for (int from = 0; from < odd; ++from) total += matrix[p][from] * parts[from][i];
          mixed[p * part + i] = total;
        }
      }
      row = buffers[0];
      std::memcpy(row, mixed, head_dim * sizeof(float));
    }
    if (inverse) apply_signs(row, head_dim);
    for (int64_t i = 0; i < head_dim; ++i) out[r * head_dim + i] = row[i] * factor;
  }
}

// Codes

// Each byte of a 1- or 2-bit plane, spread to one byte a code.
struct SpreadTables {
  uint64_t one_bit[256]{};
  uint32_t two_bits[256]{};
  constexpr SpreadTables() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8; ++i) one_bit[byte] |= static_cast<uint64_t>((byte >> i) & 1) << (8 * i);
      for (int i = 0; i < 4; ++i) two_bits[byte] |= static_cast<uint32_t>((byte >> (2 * i)) & 3) << (8 * i);
    }
  }
};

constexpr SpreadTables kSpread;  // code i is byte i of the word: x86-64 and arm64 are little-endian

// Nibbles to a byte each: 16 bytes to 32 codes.
TQ_INLINE void unpack_nibbles(const uint8_t* row, uint8_t* codes) {
#if defined(__x86_64__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm_unpackhi_epi8(low, high));
#elif defined(__aarch64__)
  const uint8x16_t bytes = vld1q_u8(row);
  vst2q_u8(codes, uint8x16x2_t{vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)});
#else
  for (int i = 0; i < 16; ++i) {
    codes[2 * i] = row[i] & 15;
    codes[2 * i + 1] = row[i] >> 4;
  }
#endif
}

// 2-bit fields to a byte each, shifted: 16 bytes add to 64 codes.
TQ_INLINE void add_two_bit_plane(const uint8_t* plane, int shift, uint8_t* codes) {
#if defined(__x86_64__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)), mask = _mm_set1_epi8(3);
  const __m128i field0 = _mm_and_si128(bytes, mask), field1 = _mm_and_si128(_mm_srli_epi16(bytes, 2), mask);
  const __m128i field2 = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i field3 = _mm_and_si128(_mm_srli_epi16(bytes, 6), mask);
  const __m128i low01 = _mm_unpacklo_epi8(field0, field1), high01 = _mm_unpackhi_epi8(field0, field1);
  const __m128i low23 = _mm_unpacklo_epi8(field2, field3), high23 = _mm_unpackhi_epi8(field2, field3);
  const __m128i quarters[4] = {_mm_unpacklo_epi16(low01, low23), _mm_unpackhi_epi16(low01, low23),
                               _mm_unpacklo_epi16(high01, high23), _mm_unpackhi_epi16(high01, high23)};
  for (int i = 0; i < 4; ++i) {
    __m128i* to = reinterpret_cast<__m128i*>(codes + 16 * i);
    _mm_storeu_si128(to, _mm_or_si128(_mm_loadu_si128(to), _mm_slli_epi16(quarters[i], shift)));
  }
#else
  for (int i = 0; i < 16; ++i) {
    uint32_t word;
    std::memcpy(&word, codes + 4 * i, 4);
    word |= kSpread.two_bits[plane[i]] << shift;
    std::memcpy(codes + 4 * i, &word, 4);
  }
#endif
}

// Bits to a byte each, shifted: 2 bytes add to 16 codes.
TQ_INLINE void add_one_bit_plane(const uint8_t* plane, int shift, uint8_t* codes) {
#if defined(TQ_ISA_AVX512)
  uint16_t bits;
  std::memcpy(&bits, plane, 2);
  __m128i* to = reinterpret_cast<__m128i*>(codes);
  const __m128i ones = _mm_maskz_set1_epi8(bits, static_cast<char>(1 << shift));
  _mm_storeu_si128(to, _mm_or_si128(_mm_loadu_si128(to), ones));
#else
  for (int i = 0; i < 2; ++i) {
    uint64_t word;
    std::memcpy(&word, codes + 8 * i, 8);
    word |= kSpread.one_bit[plane[i]] << shift;
    std::memcpy(codes + 8 * i, &word, 8);
  }
#endif
}

// The codes of one row, a byte each, below 2^bits; the row itself where it already is that.
const uint8_t* unpack(const uint8_t* row, int64_t head_dim, const StorageFormat& format, int bits, uint8_t* codes) {
  if (format.low_plane == 8) {
    if (bits == 8) return row;
    for (int64_t i = 0; i < head_dim; ++i) codes[i] = row[i] & ((1 << bits) - 1);  // whatever a foreign buffer holds
    return codes;
  }
  // Shifting within a word is shifting within each byte: the codes stay below 64.
  const auto add_two_bits = [&](const uint8_t* plane, int shift) {
    int64_t i = 0;
    for (; i + 64 <= head_dim; i += 64) add_two_bit_plane(plane + i / 4, shift, codes + i);
    for (; i < head_dim; ++i) codes[i] |= ((plane[i / 4] >> (2 * (i % 4))) & 3) << shift;
  };
  if (format.low_plane == 4) {
    int64_t i = 0;
    for (; i + 32 <= head_dim; i += 32) unpack_nibbles(row + i / 2, codes + i);
    for (; i < head_dim; i += 2) {  // head_dim 80
      codes[i] = row[i / 2] & 15;
      codes[i + 1] = row[i / 2] >> 4;
    }
  } else {
    std::memset(codes, 0, head_dim);
    add_two_bits(row, 0);
  }
  const uint8_t* high = row + head_dim * format.low_plane / 8;
  if (format.high_plane == 1) {
    for (int64_t i = 0; i < head_dim; i += 16) add_one_bit_plane(high + i / 8, format.low_plane, codes + i);
  } else if (format.high_plane == 2) {
    add_two_bits(high, format.low_plane);
  }
  return codes;
}

void pack(const uint8_t* codes, int64_t head_dim, const StorageFormat& format, uint8_t* row, int64_t row_bytes) {
  const int planes[2] = {format.low_plane, format.high_plane};
  std::memset(row, 0, row_bytes);
  int shift = 0;
  for (int plane : planes) {
    if (plane == 0) continue;
    const int mask = (1 << plane) - 1;
    for (int64_t i = 0; i < head_dim; ++i) {
      row[i * plane / 8] |= static_cast<uint8_t>(((codes[i] >> shift) & mask) << (i * plane % 8));
    }
    row += head_dim * plane / 8;
    shift += plane;
  }
}

// Coding

float to_finite_half_range(float x) {
  constexpr float kHalfMax = 65504.0f;
  return std::isinf(x) ? x : x > kHalfMax ? kHalfMax : x < -kHalfMax ? -kHalfMax : x;
}

// sqrt(mean(x^2)), scaled by the largest number so that neither huge nor tiny ones leave float32. NaN for non-finite.
float root_mean_square(const float* x, int64_t count) {
  float peak = 0, sum = 0;
  bool is_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    peak = std::fabs(x[i]) > peak ? std::fabs(x[i]) : peak;
    is_finite &= std::isfinite(x[i]);
  }
  if (!is_finite) return std::numeric_limits<float>::quiet_NaN();
  if (peak == 0) return 0;
  for (int64_t i = 0; i < count; ++i) sum += (x[i] / peak) * (x[i] / peak);
  return peak * std::sqrt(sum / count);
}

void encode_row(const float* row, int64_t head_dim, const HeadStore& store, int64_t slot, bool preserve_norm) {
  if (store.codebook == nullptr) {
    c10::Half* dense = reinterpret_cast<c10::Half*>(store.codes) + slot * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) dense[i] = c10::Half(to_finite_half_range(row[i]));
    return;
  }
  const Codebook& codebook = *store.codebook;
  uint8_t codes[TQ_MAX_HEAD_DIM];
  const int64_t groups = norm_groups(head_dim);
  const int64_t size = head_dim / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const float* x = row + group * size;
    const float rms = root_mean_square(x, size);
    const bool is_number = rms > 0;  // neither zero nor NaN
    alignas(64) float normalised[TQ_NORM_GROUP];
    alignas(64) int32_t index[TQ_NORM_GROUP] = {};
    for (int64_t i = 0; i < size; ++i) normalised[i] = is_number ? x[i] / rms : 0.0f;
    for (int t = 0; t < (1 << codebook.bits) - 1; ++t) {
      const float threshold = codebook.thresholds[t];
      for (int64_t i = 0; i < size; ++i) index[i] += normalised[i] > threshold;
    }
    float norm = rms;
    if (is_number && preserve_norm) {
      float sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += codebook.levels[index[i]] * codebook.levels[index[i]];
      norm = rms / std::sqrt(sum / size);
    }
    for (int64_t i = 0; i < size; ++i) codes[group * size + i] = static_cast<uint8_t>(index[i]);
    store.norms[slot * groups + group] = norm / store.norm_factor;
  }
  pack(codes, head_dim, *store.format, store.codes + slot * store.row_bytes, store.row_bytes);
}

// Decoding

void half_row(const c10::Half* row, const float* mean, int64_t head_dim, float* out) {
  for (int64_t i = 0; i < head_dim; i += kWidth) {
    const FloatVec x = load_half(row + i);
    store(out + i, mean ? x + load(mean + i) : x);
  }
}

template <int kBits>
void coded_row(const LevelTable& table, const uint8_t* codes, const float* norms, float norm_factor, const float* mean,
               int64_t head_dim, float* out) {
  const int64_t size = head_dim < TQ_NORM_GROUP ? head_dim : TQ_NORM_GROUP;
  for (int64_t begin = 0; begin < head_dim; begin += size) {
    const float norm = norms[begin / size] * norm_factor;
#if defined(TQ_ISA_AVX512)
    if (kBits == 8 && table.codebook->integers != nullptr && size % 32 == 0) {
      const FloatVec factor = broadcast(norm * table.codebook->scale);
      for (int64_t i = begin; i < begin + size; i += 32) {
        const __m512i integers = look_up_integers(table.codebook->integers, codes + i);
        const FloatVec a = (FloatVec)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(integers)));
        const FloatVec b = (FloatVec)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(integers, 1)));
        store(out + i, mean ? a * factor + load(mean + i) : a * factor);
        store(out + i + 16, mean ? b * factor + load(mean + i + 16) : b * factor);
      }
      continue;
    }
#endif
    const FloatVec factor = broadcast(norm);
    for (int64_t i = begin; i < begin + size; i += kWidth) {
      const FloatVec x = look_up(table, codes + i, kBits);
      store(out + i, mean ? x * factor + load(mean + i) : x * factor);
    }
  }
}

// Decodes positions of one head; keeps the float32 mean of the block it is in.
class RowDecoder {
 public:
  RowDecoder(const HeadStore& store, const TqAttendParams& params) : store_(store), params_(params) {
    table_.codebook = store.codebook;
    if (store.codebook != nullptr) {
      const int count = 1 << store.codebook->bits;
      for (int i = 0; i < 64; ++i) table_.levels[i] = store.codebook->levels[i % count];
    }
  }

  void operator()(int64_t position, float* out) {
    const int64_t head_dim = params_.head_dim;
    if (position >= params_.coded && store_.tail != nullptr) {
      half_row(store_.tail + position % params_.tail_slots * head_dim, nullptr, head_dim, out);
      return;
    }
    const int64_t slot = position % params_.slots;
    const float* mean = block_mean(slot);
    if (store_.codebook == nullptr) {
      half_row(reinterpret_cast<const c10::Half*>(store_.codes) + slot * head_dim, mean, head_dim, out);
      return;
    }
    __builtin_prefetch(store_.codes + slot * store_.row_bytes + kPrefetchBytes);
    alignas(64) uint8_t buffer[TQ_MAX_HEAD_DIM];
    const uint8_t* codes =
        unpack(store_.codes + slot * store_.row_bytes, head_dim, *store_.format, store_.codebook->bits, buffer);
    const float* norms = store_.norms + slot * norm_groups(head_dim);
    switch (store_.codebook->bits) {
#define CASE(bits) \
  case bits:       \
    return coded_row<bits>(table_, codes, norms, store_.norm_factor, mean, head_dim, out);
      CASE(2)
      CASE(3)
      CASE(4)
      CASE(5)
      CASE(6)
      CASE(8)
#undef CASE
    }
  }

 private:
  const float* block_mean(int64_t slot) {
    if (store_.means == nullptr) return nullptr;
    const int64_t block = slot / params_.block_size;
    if (block != block_) {
      half_row(store_.means + block * params_.head_dim, nullptr, params_.head_dim, mean_);
      block_ = block;
    }
    return mean_;
  }

  const HeadStore& store_;
  const TqAttendParams& params_;
  LevelTable table_;
  int64_t block_ = -1;
  alignas(64) float mean_[TQ_MAX_HEAD_DIM];
};

void decode(const HeadStore& store, const TqAttendParams& params, int64_t begin, int64_t end, float* out) {
  RowDecoder decode_row(store, params);
  for (int64_t position = begin; position < end; ++position) {
    decode_row(position, out + (position - begin) * params.head_dim);
  }
}

// Attention

// logits[r][j] = q_r . k_j for kRows rows and all positions of a tile; `count` is a multiple of kColumns.
template <int kRows>
void score_rows(const float* q, const float* keys, int64_t count, int64_t head_dim, float* logits) {
#if defined(TQ_ISA_AVX2)
  constexpr int kColumns = 2;  // 16 registers hold 8 sums and what they are made of
#else
  constexpr int kColumns = 4;
#endif
  for (int64_t j = 0; j < count; j += kColumns) {
    FloatVec sums[16] = {};
    const float* key = keys + j * head_dim;
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      FloatVec k[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) k[c] = load(key + c * head_dim + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const FloatVec x = load(q + r * head_dim + i);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] += x * k[c];
      }
    }
    float totals[16];
    sum_lanes_of_16(sums, totals);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) logits[r * kMaxTile + j + c] = totals[r * kColumns + c];
    }
  }
}

// out_r += sum_j weights[r][j] v_j.
template <int kRows>
void add_values(const float* weights, const float* values, int64_t count, int64_t head_dim, float* out,
                int64_t out_stride) {
#if defined(TQ_ISA_AVX2)
  constexpr int kColumns = 2;
#else
  constexpr int kColumns = 4;
#endif
  const auto columns = [&](int64_t i, auto column_count) TQ_LAMBDA_INLINE {
    constexpr int kCount = decltype(column_count)::value;
    FloatVec sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCount; ++c) sums[r][c] = load(out + r * out_stride + i + c * kWidth);
    }
    for (int64_t j = 0; j < count; ++j) {
      FloatVec v[kCount];
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) v[c] = load(values + j * head_dim + i + c * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const FloatVec w = broadcast(weights[r * kMaxTile + j]);
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) sums[r][c] += w * v[c];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCount; ++c) store(out + r * out_stride + i + c * kWidth, sums[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + kColumns * kWidth <= head_dim; i += kColumns * kWidth) {
    columns(i, std::integral_constant<int, kColumns>());
  }
  for (; i < head_dim; i += kWidth) columns(i, std::integral_constant<int, 1>());
}

// Calls function with std::integral_constant<int, rows in this group> for groups of at most 4 rows.
template <typename Function>
void for_row_groups(int64_t rows, Function function) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) function(r, std::integral_constant<int, 4>());
  if (rows - r == 3) function(r, std::integral_constant<int, 3>());
  if (rows - r == 2) function(r, std::integral_constant<int, 2>());
  if (rows - r == 1) function(r, std::integral_constant<int, 1>());
}

// Logits of one row to weights; updates the row's sum and maximum and rescales what it has gathered so far.
void softmax_row(float* logits, int64_t padded, float* sums, float* out, int64_t head_dim) {
  FloatVec largest = broadcast(-INFINITY);
  for (int64_t j = 0; j < padded; j += kWidth) largest = max(load(logits + j), largest);
  const float old_max = sums[1];
  const float tile_max = max_lanes(largest);
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float shift = new_max == -INFINITY ? 0.0f : new_max;  // a row that has seen nothing yet
  FloatVec total = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const FloatVec weight = exp_negative(load(logits + j) - shift);
    store(logits + j, weight);
    total += weight;
  }
  const float decay = old_max == new_max ? 1.0f : std::exp(old_max - shift);
  sums[0] = sums[0] * decay + sum_lanes(total);
  sums[1] = new_max;
  if (decay != 1.0f) {
    for (int64_t i = 0; i < head_dim; i += kWidth) store(out + i, load(out + i) * decay);
  }
}

// -inf where a row may not see a position of the tile. Returns a bit for each position that some row sees.
uint64_t hide_positions(const AttendTask& task, int64_t begin, int64_t count, int64_t padded, float* logits) {
  uint64_t seen = 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    float* row = logits + r * kMaxTile;
    const bool* mask = task.row_mask != nullptr ? task.row_mask[r] + (begin - task.params->start) : nullptr;
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t position = begin + j;
      const bool is_visible =
          j < count && position >= task.row_begin[r] && position < task.row_end[r] && (mask == nullptr || mask[j]);
      if (is_visible) {
        seen |= uint64_t{1} << j;
      } else {
        row[j] = -INFINITY;
      }
    }
  }
  return seen;
}

void attend(const AttendTask& task) {
  const TqAttendParams& params = *task.params;
  const int64_t head_dim = params.head_dim;
  const int64_t tile = tile_positions(head_dim);
  alignas(64) float dense[kTileFloats];
  alignas(64) float logits[kMaxTaskRows * kMaxTile];
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memset(task.out + r * task.out_stride, 0, head_dim * sizeof(float));
    task.sums[r * task.sums_stride] = 0.0f;
    task.sums[r * task.sums_stride + 1] = -INFINITY;
  }
  // Positions that every row sees, so that nothing need be hidden.
  int64_t common_begin = 0, common_end = task.row_mask == nullptr ? task.end : 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    common_begin = task.row_begin[r] > common_begin ? task.row_begin[r] : common_begin;
    common_end = task.row_end[r] < common_end ? task.row_end[r] : common_end;
  }
  RowDecoder decode_key(task.k, params);
  RowDecoder decode_value(task.v, params);
  for (int64_t begin = task.begin; begin < task.end; begin += tile) {
    const int64_t count = task.end - begin < tile ? task.end - begin : tile;
    const int64_t padded = (count + 15) / 16 * 16;
    for (int64_t j = 0; j < count; ++j) decode_key(begin + j, dense + j * head_dim);
    std::memset(dense + count * head_dim, 0, (padded - count) * head_dim * sizeof(float));
    for_row_groups(task.rows, [&](int64_t r, auto group) {
      score_rows<decltype(group)::value>(task.q + r * head_dim, dense, padded, head_dim, logits + r * kMaxTile);
    });
    if (params.softcap > 0) {
      for (int64_t r = 0; r < task.rows; ++r) {
        float* row = logits + r * kMaxTile;
        for (int64_t j = 0; j < count; ++j) row[j] = params.softcap * std::tanh(row[j] / params.softcap);
      }
    }
    uint64_t seen = ~uint64_t{0};
    const bool is_common = begin >= common_begin && begin + padded <= common_end;
    if (!is_common) seen = hide_positions(task, begin, count, padded, logits);
    if (seen == 0) continue;
    for (int64_t r = 0; r < task.rows; ++r) {
      softmax_row(logits + r * kMaxTile, padded, task.sums + r * task.sums_stride, task.out + r * task.out_stride,
                  head_dim);
    }
    for (int64_t j = 0; j < count; ++j) {
      if ((seen >> j) & 1) {
        decode_value(begin + j, dense + j * head_dim);
      } else {  // a weight of zero times whatever lies there may be NaN
        std::memset(dense + j * head_dim, 0, head_dim * sizeof(float));
      }
    }
    for_row_groups(task.rows, [&](int64_t r, auto group) {
      add_values<decltype(group)::value>(logits + r * kMaxTile, dense, count, head_dim, task.out + r * task.out_stride,
                                         task.out_stride);
    });
  }
}

constexpr Kernels kTable = {TQ_ISA_NAME, rotate, encode_row, decode, attend};

}  // namespace
