// From codes, a byte each, to levels in float32, a vector of bytes at a time.
//
// A level's float is looked up byte by byte: that is what processors are fast at, and a float of few digits has few
// bytes. The format's levels are integers of 8 bits, so that their upper two bytes say it all (kBytesOfLevel = 2), or
// of 16 bits (3); any others take 4.
//
// Part of kernels_impl.h: compiled once for each instruction set.

typedef uint8_t ByteVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t WordVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t DwordVec __attribute__((vector_size(kWidth * 4)));
typedef uint64_t QwordVec __attribute__((vector_size(kWidth * 4)));

constexpr int kCodes = kWidth * 4;  // in a vector of bytes

// Unsigned bytes to words (kFactor 2), dwords (4) or qwords (8): as many as fill a vector.
template <int kFactor>
TQ_INLINE auto widen(const uint8_t* p) {
#if defined(TQ_ISA_AVX512)
  if constexpr (kFactor == 2) {
    return (WordVec)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else if constexpr (kFactor == 4) {
    return (DwordVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return (QwordVec)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
#elif defined(TQ_ISA_AVX2)
  if constexpr (kFactor == 2) {
    return (WordVec)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (kFactor == 4) {
    return (DwordVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return (QwordVec)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  }
#else
  using Wide = std::conditional_t<kFactor == 2, WordVec, std::conditional_t<kFactor == 4, DwordVec, QwordVec> >;
  Wide wide;
  for (int i = 0; i < kCodes / kFactor; ++i) wide[i] = p[i];
  return wide;
#endif
}

// A vector of bytes that has the next 8 / kFactor bits of a plane at the lower end of each byte, and anything above:
// widened copies, shifted so that each part of a byte comes to the lower end of one.
template <int kFactor>
TQ_INLINE ByteVec spread(const uint8_t* plane) {
  if constexpr (kFactor == 1) {
    ByteVec x;
    __builtin_memcpy(&x, plane, sizeof(x));
    return x;
  } else {
    auto x = widen<kFactor>(plane);
    if constexpr (kFactor == 2) {
      x |= x << 4;
    } else if constexpr (kFactor == 4) {
      x |= x << 6;
      x |= x << 12;
    } else {
      x |= x << 28;
      x |= x << 14;
      x |= x << 7;
    }
    return (ByteVec)x;
  }
}

// Shifts of words: bits of the neighbouring byte come in, where nobody looks.
template <int kDistance>
TQ_INLINE ByteVec shift_right(ByteVec x) {
  if constexpr (kDistance == 0) {
    return x;
  } else if constexpr (kDistance > 0) {
    return (ByteVec)((WordVec)x >> kDistance);
  } else {
    return (ByteVec)((WordVec)x << -kDistance);
  }
}

#if defined(TQ_ISA_AVX2)
// One of 2^kBits bytes for each code, by halves: the lowest 4 bits by a shuffle, the bits above by choosing.
template <int kBits>
TQ_INLINE __m256i choose(const uint8_t* table, __m256i low, __m256i codes) {
  if constexpr (kBits <= 4) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))),
                               low);
  } else {
    const __m256i zero_half = choose<kBits - 1>(table, low, codes);
    const __m256i one_half = choose<kBits - 1>(table + (1 << (kBits - 1)), low, codes);
    // blendv looks at the highest bit of each byte.
    return _mm256_blendv_epi8(zero_half, one_half, _mm256_slli_epi16(codes, 8 - kBits));
  }
}
#endif

// table[code] for each code below 2^kBits; bits above are anything. The table is repeated to fill 256 bytes.
template <int kBits>
TQ_INLINE ByteVec look_up(const uint8_t* table, ByteVec codes) {
#if defined(TQ_ISA_AVX512)
  const __m512i index = (__m512i)codes;
  const auto entries = [table](int i) TQ_LAMBDA_INLINE { return _mm512_load_si512(table + 64 * i); };
  if constexpr (kBits <= 6) {
    return (ByteVec)_mm512_maskz_permutexvar_epi8(~__mmask64{0}, index, entries(0));
  } else {
    const __m512i low = _mm512_permutex2var_epi8(entries(0), index, entries(1));
    if constexpr (kBits == 7) return (ByteVec)low;
    const __m512i high = _mm512_permutex2var_epi8(entries(2), index, entries(3));
    return (ByteVec)_mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
#elif defined(TQ_ISA_AVX2)
  return (ByteVec)choose<kBits>(table, (__m256i)(codes & 15), (__m256i)codes);
#elif defined(__aarch64__)
  if constexpr (kBits <= 4) return (ByteVec)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)(codes & 15));
  const uint8x16_t index = (uint8x16_t)(kBits == 8 ? codes : codes & ((1 << kBits) - 1));
  uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table), index);
  // An index beyond the 64 entries leaves what is there.
  if constexpr (kBits >= 7) found = vqtbx4q_u8(found, vld1q_u8_x4(table + 64), vsubq_u8(index, vdupq_n_u8(64)));
  if constexpr (kBits == 8) {
    found = vqtbx4q_u8(found, vld1q_u8_x4(table + 128), vsubq_u8(index, vdupq_n_u8(128)));
    found = vqtbx4q_u8(found, vld1q_u8_x4(table + 192), vsubq_u8(index, vdupq_n_u8(192)));
  }
  return (ByteVec)found;
#else
  ByteVec found;
  for (int i = 0; i < kCodes; ++i) found[i] = table[codes[i] & ((1 << kBits) - 1)];
  return found;
#endif
}

// a0 b0 a1 b1 ... of the lower or upper 8 bytes of each 16.
TQ_INLINE WordVec zip_low(ByteVec a, ByteVec b) {
#if defined(TQ_ISA_AVX512)
  return (WordVec)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
#elif defined(TQ_ISA_AVX2)
  return (WordVec)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (WordVec)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  return (WordVec)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
#endif
}

TQ_INLINE WordVec zip_high(ByteVec a, ByteVec b) {
#if defined(TQ_ISA_AVX512)
  return (WordVec)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
#elif defined(TQ_ISA_AVX2)
  return (WordVec)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (WordVec)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  return (WordVec)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
#endif
}

// Floats out of words: `upper` halves and `lower` halves. Even words, then odd ones.
template <int kBytesOfLevel>
TQ_INLINE void join(WordVec upper, [[maybe_unused]] WordVec lower, FloatVec* out) {
  DwordVec even = (DwordVec)upper << 16, odd = (DwordVec)upper & 0xffff0000u;
  if constexpr (kBytesOfLevel > 2) {
    even |= (DwordVec)lower & 0xffffu;
    odd |= (DwordVec)lower >> 16;
  }
  out[0] = (FloatVec)even;
  out[1] = (FloatVec)odd;
}

#if defined(TQ_ISA_AVX2)
constexpr int kFoldedBits = 6;  // from so many bits on, half a look-up is worth the folding
#else
constexpr int kFoldedBits = 8;
#endif

// Codes to levels, over the table's factor: half kHalf of the codes to two vectors, in the order of kLevelOrder below.
template <int kBits, int kBytesOfLevel, int kHalf>
TQ_INLINE void levels_of(const LevelTable& table, ByteVec codes, FloatVec* out) {
  // Integer codebooks are symmetric: the lower half of the codes has the upper half's levels, mirrored and negative.
  constexpr bool kIsFolded = kBytesOfLevel < 4 && kBits >= kFoldedBits;
  constexpr int kLookUpBits = kIsFolded ? kBits - 1 : kBits;
  constexpr uint8_t kFirst = kIsFolded ? 1 << kLookUpBits : 0, kMirror = kIsFolded ? kFirst - 1 : 0;
  ByteVec is_negative = {};
  if constexpr (kIsFolded) {
    is_negative = (ByteVec)((codes & kFirst) == 0);
    codes ^= is_negative & kMirror;
  }
  const auto byte = [&](int b) TQ_LAMBDA_INLINE { return look_up<kLookUpBits>(table.bytes[b] + kFirst, codes); };
  const auto zip = [](ByteVec a, ByteVec b) TQ_LAMBDA_INLINE { return kHalf == 0 ? zip_low(a, b) : zip_high(a, b); };
  const WordVec upper = zip(byte(2), byte(3) ^ (is_negative & 0x80));
  WordVec lower = {};
  if constexpr (kBytesOfLevel > 2) lower = zip(kBytesOfLevel > 3 ? byte(0) : ByteVec{}, byte(1));
  join<kBytesOfLevel>(upper, lower, out);
}

// Which code of a vector of them is which number of four vectors.
struct CodeOrder {
  uint8_t code[kCodes]{};
  template <typename Function>
  constexpr explicit CodeOrder(Function code_of) {
    for (int i = 0; i < kCodes; ++i) code[i] = static_cast<uint8_t>(code_of(i / kWidth, i % kWidth));
  }
};

// As levels_of has them.
constexpr CodeOrder kLevelOrder([](int vector, int lane) {
  return 16 * (lane / 4) + 8 * (vector / 2) + 2 * (lane % 4) + vector % 2;
});

// As they come in a vector of bytes.
constexpr CodeOrder kByteOrder([](int vector, int lane) { return vector * kWidth + lane; });

// As `weave` of integers_impl.h has them: lane 4 l + i of vector n is byte 16 l + 4 n + i.
constexpr CodeOrder kWovenOrder([](int vector, int lane) { return lane / 4 * 16 + vector * 4 + lane % 4; });
