// Codes, a byte each, to the planes of a row.
// Part of kernels_impl.h: compiled once for each instruction set.

// A plane's fields, each in the low bits of a byte, side by side: a word of them shrinks to its low byte. kCodesAtOnce
// codes at a time, from number `i` on, as long as they are within `count`; returns where it ended.
template <typename Word, int kPlane, int kCodesAtOnce>
TQ_INLINE int64_t pack_plane(const uint8_t* codes, int64_t i, int64_t count, int shift, uint8_t* plane) {
  typedef Word WordVec __attribute__((vector_size(kCodesAtOnce)));
  typedef uint8_t ByteVec __attribute__((vector_size(kCodesAtOnce / sizeof(Word))));
  constexpr Word kFields = static_cast<Word>(static_cast<Word>(~Word{0}) / 255 * ((1 << kPlane) - 1));
  for (; i + kCodesAtOnce <= count; i += kCodesAtOnce) {
    WordVec words;
    __builtin_memcpy(&words, codes + i, sizeof(words));
    words = (words >> shift) & kFields;
    for (size_t joined = 1; joined < sizeof(Word); joined *= 2) words |= words >> joined * (8 - kPlane);
    const ByteVec bytes = __builtin_convertvector(words, ByteVec);
    __builtin_memcpy(plane + i * kPlane / 8, &bytes, sizeof(bytes));
  }
  return i;
}

template <typename Word, int kPlane>
TQ_INLINE void pack_plane(const uint8_t* codes, int64_t count, int shift, uint8_t* plane) {
  const int64_t rest = pack_plane<Word, kPlane, kWidth * 4>(codes, 0, count, shift, plane);
  pack_plane<Word, kPlane, 16>(codes, rest, count, shift, plane);  // all head dims are multiples of 16
}

TQ_INLINE void pack_bits(const uint8_t* codes, int64_t count, int shift, uint8_t* plane) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const uint16_t bits = static_cast<uint16_t>(_mm_movemask_epi8(_mm_slli_epi16(bytes, 7 - shift)));
    __builtin_memcpy(plane + i / 8, &bits, sizeof(bits));
  }
#else
  pack_plane<uint64_t, 1>(codes, count, shift, plane);
#endif
}

void pack(const uint8_t* codes, int64_t count, const StorageFormat& format, uint8_t* row, int64_t row_bytes) {
  const int planes[2] = {format.low_plane, format.high_plane};
  const uint8_t* end = row + row_bytes;
  int shift = 0;
  for (int plane : planes) {
    if (plane == 8) std::memcpy(row, codes, count);
    if (plane == 4) pack_plane<uint16_t, 4>(codes, count, shift, row);
    if (plane == 2) pack_plane<uint32_t, 2>(codes, count, shift, row);
    if (plane == 1) pack_bits(codes, count, shift, row);
    row += count * plane / 8;
    shift += plane;
  }
  while (row < end) *row++ = 0;
}
