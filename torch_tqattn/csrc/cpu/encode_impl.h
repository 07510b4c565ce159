// Storing new tokens: rotated, around their block's mean, as codes and norms.
// Part of kernels_impl.h: compiled once for each instruction set.

// Rotated rows

// Rotates rows of any type and stride. Returns whether a number may be beyond half precision's range: it is then
// infinite, unless kSaturate says what finite numbers become.
template <int kHeadDim, bool kSaturate, typename In, typename Out>
bool rotate_rows(const In* in, int64_t stride, int64_t rows, Out* out) {
  // Rows of one head are often a page apart. The processor does not see them coming, and they share so few of the first
  // cache's sets that they would push each other out of it.
  constexpr int64_t kAhead = 16, kIntoSecondCache = 2;
  const float factor = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  alignas(64) float row[kHeadDim];
  FloatVec squares = {};
  for (int64_t r = 0; r < rows; ++r, in += stride, out += kHeadDim) {
    if (r + kAhead < rows) {
      const char* next = reinterpret_cast<const char*>(in + kAhead * stride);
      for (size_t i = 0; i < kHeadDim * sizeof(In); i += 64) __builtin_prefetch(next + i, 0, kIntoSecondCache);
    }
    signed_hadamard<kHeadDim>(in, true, row);
    for (int i = 0; i < kHeadDim; i += kWidth) {
      const FloatVec x = load(row + i) * factor;
      squares += x * x;
      put(out + i, kSaturate ? saturate(x) : x);
    }
  }
  return !(sum_lanes(squares) < TQ_HALF_MAX * TQ_HALF_MAX);
}

template <int kHeadDim, typename In, typename Out>
void rotate_rows(const In* in, int64_t stride, int64_t rows, Out* out) {
  const bool is_beyond = rotate_rows<kHeadDim, false>(in, stride, rows, out);
  if (is_beyond && !std::is_same_v<Out, float>) rotate_rows<kHeadDim, true>(in, stride, rows, out);  // hardly ever
}

template <typename In, typename Out>
void rotate_rows(const In* in, int64_t stride, int64_t rows, int64_t head_dim, Out* out) {
  switch (head_dim) {
#define CASE(dim) \
  case dim:       \
    return rotate_rows<dim>(in, stride, rows, out);
    TQ_HEAD_DIMS(CASE)
#undef CASE
  }
}

// The rotated rows of new tokens, from `position` on.
template <typename Out>
void rotate_new(const EncodeTask& task, int64_t position, int64_t rows, Out* out) {
  const int64_t offset = (position - task.position) * task.stride;
  switch (task.type) {
    case InputType::kFloat:
      return rotate_rows(static_cast<const float*>(task.x) + offset, task.stride, rows, task.head_dim, out);
    case InputType::kHalf:
      return rotate_rows(static_cast<const c10::Half*>(task.x) + offset, task.stride, rows, task.head_dim, out);
    case InputType::kBFloat16:
      return rotate_rows(static_cast<const c10::BFloat16*>(task.x) + offset, task.stride, rows, task.head_dim, out);
  }
}

TQ_INLINE c10::Half* tail_row(const EncodeTask& task, int64_t position) {
  return task.store.tail + (task.sink_length + position % task.tail_slots) * task.head_dim;
}

// The rotated rows of positions begin..end, rounded as the tail holds them; those before `first` are zeros.
void gather(const EncodeTask& task, int64_t begin, int64_t end, int64_t first, c10::Half* rows) {
  const int64_t head_dim = task.head_dim;
  const auto row = [&](int64_t position) { return rows + (position - begin) * head_dim; };
  int64_t position = begin;
  for (; position < end && position < task.position; ++position) {
    std::memcpy(row(position), tail_row(task, position), head_dim * sizeof(c10::Half));
  }
  if (position < end) rotate_new(task, position, end - position, row(position));
  std::memset(static_cast<void*>(rows), 0, (first - begin) * head_dim * sizeof(c10::Half));
}

// Means

TQ_INLINE bool is_finite(const c10::Half* row, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; ++i) {
    if ((row[i].x & 0x7c00) == 0x7c00) return false;
  }
  return true;
}

// Sums of the columns of those rows that have neither NaN nor infinities; returns how many these are.
int64_t sum_finite_rows(const c10::Half* rows, int64_t count, int64_t head_dim, float* sums) {
  int64_t counted = 0;
  std::memset(sums, 0, head_dim * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    const c10::Half* row = rows + r * head_dim;
    if (!is_finite(row, head_dim)) continue;
    for (int64_t i = 0; i < head_dim; i += kWidth) store(sums + i, load(sums + i) + load_number(row + i));
    ++counted;
  }
  return counted;
}

int64_t sum_rows(const c10::Half* rows, int64_t count, int64_t head_dim, float* sums) {
  constexpr int64_t kColumns = 4;  // vectors that are summed at once; all head dims are multiples of 16
  FloatVec spoilt = {};
  for (int64_t begin = 0; begin < head_dim;) {
    const int64_t columns = head_dim - begin >= kColumns * kWidth ? kColumns : 1;
    FloatVec total[kColumns] = {};
    for (int64_t r = 0; r < count; ++r) {
      const c10::Half* row = rows + r * head_dim + begin;
      if (columns == kColumns) {
        for (int64_t i = 0; i < kColumns; ++i) total[i] += load_number(row + i * kWidth);
      } else {
        total[0] += load_number(row);
      }
    }
    for (int64_t i = 0; i < columns; ++i, begin += kWidth) {
      store(sums + begin, total[i]);
      spoilt += total[i] * 0.0f;
    }
  }
  // Sums of finite halves are finite: 0 times them is 0.
  return sum_lanes(spoilt) == 0 ? count : sum_finite_rows(rows, count, head_dim, sums);
}

// Stores the mean of these rows, and returns it as it was stored.
void store_mean(const c10::Half* rows, int64_t count, int64_t head_dim, c10::Half* stored, float* mean) {
  const int64_t counted = sum_rows(rows, count, head_dim, mean);
  const float divisor = static_cast<float>(counted > 0 ? counted : 1);
  for (int64_t i = 0; i < head_dim; i += kWidth) {
    store_half(stored + i, saturate(load(mean + i) / divisor));
    store(mean + i, load_number(stored + i));
  }
}

// Codes

// Odd polynomials, fitted by least squares: at each threshold they are within 0.25 of its index, as counted from the
// middle one. So the nearest integer names the only threshold that a number has still to be compared with.
template <int kBits>
constexpr float kGuess[4] = {};
template <>
constexpr float kGuess<2>[4] = {1.0186f};
template <>
constexpr float kGuess<3>[4] = {2.0138f, -0.097948f};
template <>
constexpr float kGuess<4>[4] = {3.8026f, -0.15659f};
template <>
constexpr float kGuess<5>[4] = {7.3434f, -0.26795f};
template <>
constexpr float kGuess<6>[4] = {14.811f, -0.71896f, 0.01919f};
template <>
constexpr float kGuess<8>[4] = {58.907f, -3.0608f, 0.11406f, -0.0018701f};

template <int kBits, typename Vec>
TQ_INLINE constexpr Vec guess(Vec x) {
  constexpr const float* c = kGuess<kBits>;
  const Vec square = x * x;
  Vec p = c[0] + Vec{};
  if constexpr (c[3] != 0) {
    p = c[0] + square * (c[1] + square * (c[2] + square * c[3]));
  } else if constexpr (c[2] != 0) {
    p = c[0] + square * (c[1] + square * c[2]);
  } else if constexpr (c[1] != 0) {
    p = c[0] + square * c[1];
  }
  return x * p;
}

// Whether every number between two thresholds is guessed to be at one of them.
template <int kBits>
constexpr bool guesses_are_near(const float* thresholds) {
  const int last = (1 << kBits) - 2;
  for (int t = 0; t <= last; ++t) {
    const float wanted = static_cast<float>(t - last / 2);
    for (int step = 0; step < 8; ++step) {
      const float next = thresholds[t < last ? t + 1 : t];
      const float off = guess<kBits>(thresholds[t] + (next - thresholds[t]) * step / 8) - wanted;
      if (off < -0.25f || off > (step == 0 ? 0.25f : 1.25f)) return false;
    }
  }
  return true;
}

static_assert(guesses_are_near<2>(kThresholds2) && guesses_are_near<3>(kThresholds3));
static_assert(guesses_are_near<4>(kThresholds4) && guesses_are_near<4>(kExactThresholds4));
static_assert(guesses_are_near<5>(kThresholds5) && guesses_are_near<5>(kExactThresholds5));
static_assert(guesses_are_near<6>(kThresholds6) && guesses_are_near<6>(kExactThresholds6));
static_assert(guesses_are_near<8>(kThresholds8) && guesses_are_near<8>(kExactThresholds8));

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
    }
    largest_ = codebook.thresholds[kLast - 1];
    integers_ = codebook.integers;
    scale_ = codebook.scale / 65536;
  }

  // Codes, in the low byte of each lane: how many thresholds each number is beyond.
  TQ_INLINE IntVec code(FloatVec x) const {
    const FloatVec high = broadcast(largest_);
    const FloatVec below = x < high ? x : high;
    // Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
    const FloatVec shifted = guess<kBits>(below > -high ? below : -high) + (12582912.0f + (1 << (kBits - 1)) - 1);
    const IntVec index = (IntVec)shifted;
    const FloatVec threshold = pick<kEntries>(thresholds_, index);
#if defined(TQ_ISA_AVX512)
    const __mmask16 is_beyond = _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GT_OQ);
    return (IntVec)_mm512_mask_add_epi32((__m512i)index, is_beyond, (__m512i)index, _mm512_set1_epi32(1));
#else
    return index - (x > threshold);
#endif
  }

  TQ_INLINE FloatVec level(IntVec code) const {
#if defined(TQ_ISA_AVX512)
    if constexpr (kBits == 8) {
      if (integers_ != nullptr) return (FloatVec)_mm512_cvtepi32_ps(pick_integer(integers_, (__m512i)code)) * scale_;
    }
#endif
    return pick<kEntries>(levels_, code);
  }

 private:
  static constexpr int kEntries = kBits <= 3 && kWidth == 8 ? 8 : kBits <= 4 ? 16 : 1 << kBits;
  alignas(64) float thresholds_[kEntries];
  alignas(64) float levels_[kEntries];
  float largest_;
  const int16_t* integers_;
  float scale_;  // of integers times 2^16
};

// The low byte of each lane.
TQ_INLINE void store_bytes(uint8_t* p, IntVec v) {
#if defined(TQ_ISA_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
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
    const FloatVec level = quantiser.level(code);
    squares += level * level;
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

// A plane's fields, each in the low bits of a byte, side by side: a word of them shrinks to its low byte.
template <typename Word, int kPlane>
TQ_INLINE void pack_plane(const uint8_t* codes, int64_t count, int shift, uint8_t* plane) {
  typedef Word WordVec __attribute__((vector_size(16)));
  typedef uint8_t ByteVec __attribute__((vector_size(16 / sizeof(Word))));
  constexpr Word kFields = static_cast<Word>(static_cast<Word>(~Word{0}) / 255 * ((1 << kPlane) - 1));
  for (int64_t i = 0; i < count; i += 16) {  // all head dims are multiples of 16
    WordVec words;
    __builtin_memcpy(&words, codes + i, sizeof(words));
    words = (words >> shift) & kFields;
    for (size_t joined = 1; joined < sizeof(Word); joined *= 2) words |= words >> joined * (8 - kPlane);
    const ByteVec bytes = __builtin_convertvector(words, ByteVec);
    __builtin_memcpy(plane + i * kPlane / 8, &bytes, sizeof(bytes));
  }
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

void pack(const uint8_t* codes, int64_t head_dim, const StorageFormat& format, uint8_t* row, int64_t row_bytes) {
  const int planes[2] = {format.low_plane, format.high_plane};
  const uint8_t* end = row + row_bytes;
  int shift = 0;
  for (int plane : planes) {
    if (plane == 8) std::memcpy(row, codes, head_dim);
    if (plane == 4) pack_plane<uint16_t, 4>(codes, head_dim, shift, row);
    if (plane == 2) pack_plane<uint32_t, 2>(codes, head_dim, shift, row);
    if (plane == 1) pack_bits(codes, head_dim, shift, row);
    row += head_dim * plane / 8;
    shift += plane;
  }
  while (row < end) *row++ = 0;
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

// Normalises a group that is out of float32's comfortable range, in place; returns its root mean square.
float normalise(float* x, int64_t size) {
  const float rms = root_mean_square(x, size);
  for (int64_t i = 0; i < size; ++i) x[i] = rms > 0 ? x[i] / rms : 0.0f;
  return rms;
}

constexpr int64_t kBatchGroups = 16;  // coded at a time: a group alone would be a chain of instructions that wait

// Rows that are coded together, and the sums of their groups' squares, lane by lane.
struct Batch {
  alignas(64) float rows[kBatchGroups * TQ_NORM_GROUP];
  FloatVec squares[kBatchGroups] = {};
};

// Roots of sums of squares over `size` numbers.
TQ_INLINE void root_means(const FloatVec* squares, int64_t size, float* sums, float* roots) {
  sum_lanes_of_16(squares, sums);
  for (int64_t i = 0; i < kBatchGroups; i += kWidth) {
    store(roots + i, square_root(load(sums + i) / static_cast<float>(size)));
  }
}

// Codes `count` rows, of at most kBatchGroups groups together.
template <int kBits>
void encode_batch(const EncodeTask& task, const Quantiser<kBits>& quantiser, Batch& batch, int64_t count,
                  int64_t slot) {
  const HeadStore& to = task.store;
  const int64_t head_dim = task.head_dim, groups = norm_groups(head_dim), size = head_dim / groups;
  alignas(64) float sums[kBatchGroups], norms[kBatchGroups], lengths[kBatchGroups];
  alignas(64) uint8_t codes[kBatchGroups * TQ_NORM_GROUP];
  root_means(batch.squares, size, sums, norms);
  for (int64_t group = 0; group < count * groups; ++group) {
    float* x = batch.rows + group * size;
    float inverse = 1.0f / norms[group];
    if (!(sums[group] > 1e-20f && sums[group] < 1e30f)) {  // else, squares that became zero do not matter
      norms[group] = normalise(x, size);
      inverse = 1.0f;
    }
    if (task.encode == Encode::kBest && norms[group] > 0) inverse /= best_multiplier(quantiser, x, size, inverse);
    batch.squares[group] = quantise(quantiser, x, size, inverse, codes + group * size);
  }
  root_means(batch.squares, size, sums, lengths);
  for (int64_t group = 0; group < count * groups; ++group) {
    const bool keeps_length = task.encode != Encode::kPlain && norms[group] > 0;
    to.norms[slot * groups + group] = norms[group] / (keeps_length ? lengths[group] * to.norm_factor : to.norm_factor);
  }
  // Only now: reading codes that were just written, in pieces of another size, would wait for them.
  for (int64_t row = 0; row < count; ++row) {
    pack(codes + row * head_dim, head_dim, *to.format, to.codes + (slot + row) * to.row_bytes, to.row_bytes);
  }
}

// A group's numbers to be coded, from halves if these are given, around their mean if there is one; of a hidden token
// zeros. Returns the sum of squares, lane by lane.
TQ_INLINE FloatVec centre(const c10::Half* halves, const float* mean, bool is_hidden, int64_t size, float* x) {
  FloatVec squares = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    FloatVec number = halves != nullptr ? load_number(halves + i) : load(x + i);
    if (mean != nullptr) number -= load(mean + i);
    if (is_hidden) number = FloatVec{};
    store(x + i, number);
    squares += number * number;
  }
  return squares;
}

// Codes positions begin..end, of which those before `first` are padding or sinks.
template <int kBits>
void encode_coded(const EncodeTask& task, int64_t begin, int64_t end, int64_t first, c10::Half* gathered) {
  const int64_t head_dim = task.head_dim, slot = begin % task.slots;
  const int64_t groups = norm_groups(head_dim), size = head_dim / groups, rows = kBatchGroups / groups;
  const Quantiser<kBits> quantiser(*task.store.codebook);
  alignas(64) float mean[TQ_MAX_HEAD_DIM];
  Batch batch;
  const bool has_mean = task.store.means != nullptr;
  if (task.block_size > 0) gather(task, begin, end, first, gathered);
  if (has_mean) {
    store_mean(gathered + (first - begin) * head_dim, end - first, head_dim,
               task.store.means + slot / task.block_size * head_dim, mean);
  }
  for (int64_t position = begin; position < end; position += rows) {
    const int64_t count = end - position < rows ? end - position : rows;
    if (task.block_size == 0) rotate_new(task, position, count, batch.rows);
    for (int64_t group = 0; group < count * groups; ++group) {
      const int64_t i = (position - begin) * head_dim + group * size;
      const c10::Half* halves = task.block_size > 0 ? gathered + i : nullptr;
      const bool is_hidden = position + group / groups < first;
      batch.squares[group] =
          centre(halves, has_mean ? mean + group % groups * size : nullptr, is_hidden, size, batch.rows + group * size);
    }
    encode_batch(task, quantiser, batch, count, slot + position - begin);
  }
}

void encode(const EncodeTask& task, int64_t begin, int64_t end, c10::Half* gathered) {
  const int64_t sinks_end = task.store.first + task.sink_length;
  const int64_t first = sinks_end < begin ? begin : sinks_end < end ? sinks_end : end;
  if (task.store.codebook == nullptr) {
    c10::Half* dense = reinterpret_cast<c10::Half*>(task.store.codes);
    return gather(task, begin, end, first, dense + begin % task.slots * task.head_dim);
  }
  switch (task.store.codebook->bits) {
#define CASE(bits) \
  case bits:       \
    return encode_coded<bits>(task, begin, end, first, gathered);
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
    CASE(8)
#undef CASE
  }
}

void store_dense(const EncodeTask& task, int64_t begin, int64_t end) {
  const int64_t sinks_end = task.store.first + task.sink_length;
  int64_t position = task.position > task.store.first ? task.position : task.store.first;
  for (; position < sinks_end && position < task.end; ++position) {
    rotate_new(task, position, 1, task.store.tail + (position - task.store.first) * task.head_dim);
  }
  for (position = begin; position < end; ++position) {
    c10::Half* waiting = tail_row(task, position);
    if (position < sinks_end) {
      std::memset(static_cast<void*>(waiting), 0, task.head_dim * sizeof(c10::Half));
    } else {
      rotate_new(task, position, 1, waiting);
    }
  }
}
