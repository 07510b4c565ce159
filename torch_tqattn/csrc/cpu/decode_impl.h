// Reading a position's numbers, whatever holds them.
// Part of kernels_impl.h: compiled once for each instruction set.

constexpr int kPrefetchBytes = 4096;  // how far ahead rows are fetched into the cache

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
  const uint8x16x2_t nibbles = {vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)};
  vst2q_u8(codes, nibbles);
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
#if defined(TQ_ISA_AVX512) || defined(TQ_ISA_AVX2)
  uint16_t bits;
  std::memcpy(&bits, plane, 2);
  __m128i* to = reinterpret_cast<__m128i*>(codes);
  const __m128i one = _mm_set1_epi8(static_cast<char>(1 << shift));
#if defined(TQ_ISA_AVX512)
  const __m128i ones = _mm_maskz_mov_epi8(bits, one);
#else
  const __m128i spread = _mm_shuffle_epi8(_mm_set1_epi16(bits), _mm_set_epi64x(0x0101010101010101, 0));
  const __m128i bit = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201));  // bit i of the byte, at code i
  const __m128i ones = _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit), one);
#endif
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

void half_row(const c10::Half* row, int64_t head_dim, float* out) {
  for (int64_t i = 0; i < head_dim; i += kWidth) store(out + i, load_half(row + i));
}

// A row's numbers as the codebook gives them, and the factor that they still want. Where two norm groups share a row
// there is no such factor: the numbers have their norms already.
template <int kBits>
float coded_row(const LevelTable& table, const uint8_t* codes, const float* norms, float norm_factor, int64_t head_dim,
                float* out) {
#if defined(TQ_ISA_AVX512)
  if (kBits == 8 && table.codebook->integers != nullptr && head_dim <= TQ_NORM_GROUP && head_dim % 32 == 0) {
    for (int64_t i = 0; i < head_dim; i += 32) {
      const __m512i integers = look_up_integers(table.codebook->integers, codes + i);
      const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(integers));
      const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(integers, 1));
      store(out + i, (FloatVec)_mm512_cvtepi32_ps(low));
      store(out + i + 16, (FloatVec)_mm512_cvtepi32_ps(high));
    }
    return norms[0] * norm_factor * table.codebook->scale;
  }
#endif
  if (head_dim <= TQ_NORM_GROUP) {
    for (int64_t i = 0; i < head_dim; i += kWidth) store(out + i, look_up(table, codes + i, kBits));
    return norms[0] * norm_factor;
  }
  for (int64_t begin = 0; begin < head_dim; begin += TQ_NORM_GROUP) {
    const FloatVec factor = broadcast(norms[begin / TQ_NORM_GROUP] * norm_factor);
    for (int64_t i = begin; i < begin + TQ_NORM_GROUP; i += kWidth) {
      store(out + i, look_up(table, codes + i, kBits) * factor);
    }
  }
  return 1.0f;
}

// Where neighbouring positions of a cache are kept.
enum class Place { kSink, kCoded, kTail };

// A run of positions that are kept alike, around the same mean.
struct Run {
  Place place;
  int64_t end;
};

// Reads the positions of one head.
class RowDecoder {
 public:
  RowDecoder(const HeadStore& store, const TqAttendParams& params) : store_(store), params_(params) {
    table_.codebook = store.codebook;
    if (store.codebook != nullptr) {
      const int count = 1 << store.codebook->bits;
      for (int i = 0; i < 64; ++i) table_.levels[i] = store.codebook->levels[i % count];
    }
  }

  // The run from `position` on, up to `end`.
  Run run(int64_t position, int64_t end) const {
    const int64_t sinks_end = store_.first + params_.sink_length;
    if (position >= store_.first && position < sinks_end) return {Place::kSink, smaller(end, sinks_end)};
    if (position < store_.first) end = smaller(end, store_.first);
    if (params_.block_size == 0) return {Place::kCoded, end};
    if (position >= params_.coded) return {Place::kTail, end};
    return {Place::kCoded, smaller(end, (position / params_.block_size + 1) * params_.block_size)};
  }

  // The mean that a coded position's numbers are around, float32 [head_dim]; null if there is none.
  const float* mean(Place place, int64_t position) {
    if (place != Place::kCoded || store_.means == nullptr) return nullptr;
    const int64_t block = position % params_.slots / params_.block_size;
    if (block != block_) {
      const c10::Half* row = store_.means + block * params_.head_dim;
      half_row(row, params_.head_dim, mean_);
      // The next one comes too late for the processor to see a pattern.
      for (int64_t i = 0; i < params_.head_dim; i += 32) __builtin_prefetch(row + params_.head_dim + i);
      block_ = block;
    }
    return mean_;
  }

  // The numbers of a position, less its mean; returns the factor that they still want.
  float numbers(Place place, int64_t position, float* out) const {
    const int64_t head_dim = params_.head_dim;
    if (place != Place::kCoded) {
      const int64_t row =
          place == Place::kSink ? position - store_.first : params_.sink_length + position % params_.tail_slots;
      half_row(store_.tail + row * head_dim, head_dim, out);
      return 1.0f;
    }
    const int64_t slot = position % params_.slots;
    if (store_.codebook == nullptr) {
      half_row(reinterpret_cast<const c10::Half*>(store_.codes) + slot * head_dim, head_dim, out);
      return 1.0f;
    }
    __builtin_prefetch(store_.codes + slot * store_.row_bytes + kPrefetchBytes);
    alignas(64) uint8_t buffer[TQ_MAX_HEAD_DIM];
    const uint8_t* codes =
        unpack(store_.codes + slot * store_.row_bytes, head_dim, *store_.format, store_.codebook->bits, buffer);
    const float* norms = store_.norms + slot * norm_groups(head_dim);
    switch (store_.codebook->bits) {
#define CASE(bits) \
  case bits:       \
    return coded_row<bits>(table_, codes, norms, store_.norm_factor, head_dim, out);
      CASE(2)
      CASE(3)
      CASE(4)
      CASE(5)
      CASE(6)
      CASE(8)
#undef CASE
    }
    return 0.0f;  // no codebook has another number of bits
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  const HeadStore& store_;
  const TqAttendParams& params_;
  LevelTable table_;
  int64_t block_ = -1;
  alignas(64) float mean_[TQ_MAX_HEAD_DIM];
};

void decode(const HeadStore& store, const TqAttendParams& params, int64_t begin, int64_t end, float* out) {
  const int64_t head_dim = params.head_dim;
  RowDecoder decoder(store, params);
  for (int64_t position = begin; position < end;) {
    const Run run = decoder.run(position, end);
    const float* mean = decoder.mean(run.place, position);
    for (; position < run.end; ++position, out += head_dim) {
      const float factor = decoder.numbers(run.place, position, out);
      for (int64_t i = 0; i < head_dim; ++i) out[i] = out[i] * factor + (mean != nullptr ? mean[i] : 0.0f);
    }
  }
}
