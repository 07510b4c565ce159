// Products of levels that are integers with queries and weights, for processors with an instruction that adds four
// products of bytes to each lane, in the time that one product of floats takes.
//
// What levels are multiplied with is written as digits of 8 bits, relative to the largest of its row: a query's part
// with one norm, or a tile's weights. 2 digits are kept where inputs have 16 bits, and 3, as much as a float32 keeps,
// where they are float32. Levels of 2 to 5 bits have one digit, and all products are exact. Those of 6 and 8 bits have
// two; they are multiplied with 2 digits only, and products of the lowest digits, smaller than what was rounded off,
// are left out. Products of digits of one rank, the sum of their places, are added up together; finished sums are
// converted to float.
//
// Part of kernels_impl.h: compiled once for each instruction set.

#if defined(TQ_HAS_DOT)
// Sums plus each lane's four products of bytes without and with signs.
TQ_INLINE IntVec dot(IntVec sums, ByteVec without_signs, ByteVec with_signs) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)without_signs, (__m512i)with_signs);
}

TQ_INLINE ByteVec broadcast(int32_t four_bytes) { return (ByteVec)(IntVec{} + four_bytes); }

// A row of numbers, each a step times (digit 0 + 256 digit 1 + ...): digit p of each four, in a dword.
template <int64_t kNumbers>
struct Digits {
  alignas(64) int32_t four[kNumbers / 4][4];
  float step;

  // 16 integers of up to 4 bytes, from number `at` on.
  TQ_INLINE void put(int64_t at, IntVec integers) {
    const __m512i transposed =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_store_si512(four[at / 4], _mm512_shuffle_epi8((__m512i)integers, transposed));
  }

  // Takes the step for numbers up to `largest`, which is to become `integer`; returns what to multiply them with.
  TQ_INLINE float take_step(float largest, float integer) {
    const float limit = std::numeric_limits<float>::max();
    const float inverse = largest * limit > integer ? integer / largest : limit;
    step = 1.0f / inverse;
    return inverse;
  }
};

TQ_INLINE IntVec rounded(FloatVec x) { return (IntVec)_mm512_cvtps_epi32((__m512)x); }

// A query's numbers, with digits -128 .. 127.
struct QueryDigits : Digits<TQ_NORM_GROUP> {
  int32_t origin[kMaxDigits];  // where the sums of each rank begin: the levels' highest digits have 128 added

  // `count` is a multiple of kWidth. Should any number be none, or infinite, the step is none.
  void write(int digits, int level_digits, const float* numbers, int64_t count) {
    FloatVec largest = {}, spoilt = {};
    for (int64_t i = 0; i < count; i += kWidth) {
      const FloatVec x = load(numbers + i);
      largest = max((FloatVec)((IntVec)x & 0x7fffffff), largest);
      spoilt += x * 0.0f;
    }
    // Such that no digit is above 127. With the offset added, each digit is one byte, and 128 too large.
    const float inverse = take_step(max_lanes(largest), digits == 2 ? 0x7f7f : 0x7f7f00);
    const int32_t offset = digits == 2 ? 0x8080 : 0x808080;
    for (int64_t i = 0; i < count; i += kWidth) {
      put(i, (rounded(load(numbers + i) * inverse) + offset) ^ offset);
    }
    step += sum_lanes(spoilt);
    for (int p = 0; p < digits; ++p) {
      IntVec total = {};
      for (int64_t i = 0; i < count; i += 4) total = dot(total, ByteVec{} + 128, broadcast(four[i / 4][p]));
      origin[p] = -total[0];
      // What is left out, for levels' lowest digits of 128 on average.
      if (level_digits == 2 && p == 0) origin[0] -= origin[0] / 256;
    }
  }
};

// A tile's weights of one query, none of them negative: the digits have no signs.
struct WeightDigits : Digits<kMaxTile> {
  float total;  // of the integers, for levels of two digits

  TQ_INLINE void write(int digits, int level_digits, const float* numbers, int64_t count, float largest) {
    const float inverse = take_step(largest, digits == 2 ? 0xffff : 0xffff00);
    IntVec sum = {};
    for (int64_t j = 0; j < count; j += kWidth) {
      const IntVec integers = rounded(load(numbers + j) * inverse);
      put(j, integers);
      sum += integers;
    }
    if (level_digits == 2) total = static_cast<float>(_mm512_reduce_add_epi32((__m512i)sum));
  }
};

// The largest of `count` numbers, infinite if any of them is negative or none.
TQ_INLINE float largest_weight(const float* numbers, int64_t count) {
  __m512i largest = _mm512_setzero_si512();  // of the bits: floats without signs are in the order of their bits
  for (int64_t j = 0; j < count; j += kWidth) largest = _mm512_max_epu32(largest, (__m512i)load(numbers + j));
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  float number;
  std::memcpy(&number, &bits, 4);
  return number >= 0 ? number : INFINITY;
}

// The sums of all ranks put together. None of up to 128 products leaves 24 bits.
template <int kDigits>
TQ_INLINE FloatVec join_ranks(const IntVec (&sums)[kDigits]) {
  const FloatVec low = __builtin_convertvector((sums[1] << 8) + sums[0], FloatVec);
  if constexpr (kDigits == 2) return low;
  return __builtin_convertvector(sums[kDigits - 1], FloatVec) * 65536.0f + low;
}

// Adds the products of four levels a lane with digit p of what they are multiplied with to the sums of their ranks.
// `product` is `dot`, or that with its operands the other way round.
template <int kDigits, int kLevelDigits, typename Product>
TQ_INLINE void add_to_ranks(const ByteVec (&levels)[kLevelDigits], int p, ByteVec digit, Product product,
                            IntVec (&sums)[kDigits]) {
#pragma GCC unroll 2
  for (int l = 0; l < kLevelDigits; ++l) {
    const int rank = p + l - (kLevelDigits - 1);
    if (rank >= 0) sums[rank] = product(sums[rank], levels[l], digit);
  }
}

// From rows of bytes to columns: lane j of columns[d] is dword d of row j.
TQ_INLINE void transpose(const ByteVec (&rows)[kWidth], ByteVec* columns) {
  __m512i fours[4][4];  // [dword % 4][rows / 4]
  for (int i = 0; i < 4; ++i) {
    const __m512i a = (__m512i)rows[4 * i], b = (__m512i)rows[4 * i + 1];
    const __m512i c = (__m512i)rows[4 * i + 2], d = (__m512i)rows[4 * i + 3];
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    fours[0][i] = _mm512_unpacklo_epi64(ab_low, cd_low);
    fours[1][i] = _mm512_unpackhi_epi64(ab_low, cd_low);
    fours[2][i] = _mm512_unpacklo_epi64(ab_high, cd_high);
    fours[3][i] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i first_low = _mm512_shuffle_i32x4(fours[i][0], fours[i][1], 0x44);
    const __m512i first_high = _mm512_shuffle_i32x4(fours[i][0], fours[i][1], 0xee);
    const __m512i last_low = _mm512_shuffle_i32x4(fours[i][2], fours[i][3], 0x44);
    const __m512i last_high = _mm512_shuffle_i32x4(fours[i][2], fours[i][3], 0xee);
    columns[i] = (ByteVec)_mm512_shuffle_i32x4(first_low, last_low, 0x88);
    columns[4 + i] = (ByteVec)_mm512_shuffle_i32x4(first_low, last_low, 0xdd);
    columns[8 + i] = (ByteVec)_mm512_shuffle_i32x4(first_high, last_high, 0x88);
    columns[12 + i] = (ByteVec)_mm512_shuffle_i32x4(first_high, last_high, 0xdd);
  }
}

// Four rows of bytes side by side, in the order of kWovenOrder.
TQ_INLINE void weave(const ByteVec (&rows)[4], ByteVec (&woven)[4]) {
  const __m512i ab[2] = {(__m512i)zip_low(rows[0], rows[1]), (__m512i)zip_high(rows[0], rows[1])};
  const __m512i cd[2] = {(__m512i)zip_low(rows[2], rows[3]), (__m512i)zip_high(rows[2], rows[3])};
  for (int i = 0; i < 2; ++i) {
    woven[2 * i] = (ByteVec)_mm512_unpacklo_epi16(ab[i], cd[i]);
    woven[2 * i + 1] = (ByteVec)_mm512_unpackhi_epi16(ab[i], cd[i]);
  }
}

// One vector of packed codes of each of a tile's rows: keys in columns, kWidth positions side by side; or values woven,
// four side by side.
union PackedTile {
  ByteVec keys[kMaxTile / kWidth][kWidth];
  ByteVec values[4][kMaxTile / 4];
};

// What is left of the last vector of positions has the last row again.
template <typename Packed>
TQ_INLINE void read_columns(const Packed& packed, Span span, int64_t count, PackedTile& tile) {
  const uint8_t* row = span.first;
  for (int64_t j = 0; j < count; j += kWidth) {
    ByteVec rows[kWidth];
    for (int i = 0; i < kWidth; ++i, row += j + i < count ? span.stride : 0) rows[i] = packed.read(row);
    transpose(rows, tile.keys[j / kWidth]);
  }
}

template <typename Packed>
TQ_INLINE void read_woven(const Packed& packed, Span span, int64_t count, PackedTile& tile) {
  const uint8_t* row = span.first;
  for (int64_t j = 0; j < count; j += 4) {
    ByteVec rows[4], woven[4];
    for (int i = 0; i < 4; ++i, row += j + i < count ? span.stride : 0) rows[i] = packed.read(row);
    weave(rows, woven);
    for (int n = 0; n < 4; ++n) tile.values[n][j / 4] = woven[n];
  }
}

// The levels of packed codes: of the first ones of the bytes or, after a shift, of the second ones. Tables are
// repeated, so that it does not matter what is above a code.
template <typename Levels, int kShift>
TQ_INLINE void look_up_levels(const uint8_t (&tables)[2][256], ByteVec packed,
                              ByteVec (&levels)[Levels::kLevelDigits]) {
  const ByteVec codes = shift_right<kShift>(packed);
#pragma GCC unroll 2
  for (int l = 0; l < Levels::kLevelDigits; ++l) levels[l] = look_up<Levels::kBits>(tables[l], codes);
}

// Fetches what lies behind a tile into the cache, spread over the time that the tile's products take: all at once would
// be more than the processor has on its way, and it would wait.
struct Prefetch {
  const uint8_t* next;
  int64_t step;
  TQ_INLINE void operator()() {
    __builtin_prefetch(next);
    if (step > 64) __builtin_prefetch(next + 64);
    next += step;
  }
};

// logits[r * kLogitRow + j] = query r . key j, for kRows queries: the part of the dims that the packed codes have, from
// number `at` of the norm group on, is added to what other parts left unless it is the first.
template <int kRows, int kDigits, typename Levels>
void score_columns(const LevelTable& table, const PackedTile& tile, int64_t count, int64_t at,
                   const QueryDigits* queries, Prefetch prefetch, float* logits) {
  constexpr int kColumns = 2;  // that share what is loaded of the queries
  for (int64_t j = 0; j < count; j += kColumns * kWidth) {
    const ByteVec* columns[kColumns] = {tile.keys[j / kWidth], tile.keys[j / kWidth + (j + kWidth < count)]};
    IntVec sums[kColumns][kRows][kDigits];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kDigits; ++p) {
        sums[0][r][p] = sums[1][r][p] = at == 0 ? IntVec{} + queries[r].origin[p] : IntVec{};
      }
    }
    for (int d = 0; d < kWidth; ++d) {
      const auto add = [&](auto shift, int64_t number) TQ_LAMBDA_INLINE {
        ByteVec levels[kColumns][Levels::kLevelDigits];
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; ++c) {
          look_up_levels<Levels, decltype(shift)::value>(table.without_sign, columns[c][d], levels[c]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int p = 0; p < kDigits; ++p) {
            const ByteVec of_q = broadcast(queries[r].four[number / 4][p]);
#pragma GCC unroll 2
            for (int c = 0; c < kColumns; ++c) add_to_ranks(levels[c], p, of_q, dot, sums[c][r]);
          }
        }
      };
      prefetch();
      add(std::integral_constant<int, 0>(), at + 4 * d);
      if constexpr (Levels::kShift != 0) add(std::integral_constant<int, Levels::kShift>(), at + kCodes + 4 * d);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) {
        float* to = logits + r * kLogitRow + j + c * kWidth;
        const FloatVec product = join_ranks(sums[c][r]) * (queries[r].step * Levels::kFactor);
        store(to, at == 0 ? product : load(to) + product);
      }
    }
  }
}

// out_r += sum_j weight r, j * value j, for kRows queries: the numbers that the packed codes have.
template <int kRows, int kDigits, typename Levels>
void add_woven(const LevelTable& table, const PackedTile& tile, int64_t count, const WeightDigits* weights,
               Prefetch prefetch, float* out, int64_t out_stride) {
  constexpr int kVectors = 2;  // that share what is loaded of the weights
  for (int n = 0; n < 4; n += Levels::kShift == 0 ? kVectors : 1) {
    const ByteVec* packed[kVectors] = {tile.values[n], tile.values[Levels::kShift == 0 ? n + 1 : n]};
    IntVec sums[kVectors][kRows][kDigits] = {};
    for (int64_t j = 0; j < count; j += 4) {
      prefetch();
      ByteVec levels[kVectors][Levels::kLevelDigits];
      look_up_levels<Levels, 0>(table.with_sign, packed[0][j / 4], levels[0]);
      look_up_levels<Levels, Levels::kShift>(table.with_sign, packed[1][j / 4], levels[1]);
      const auto swapped = [](IntVec sum, ByteVec level, ByteVec weight)
                               TQ_LAMBDA_INLINE { return dot(sum, weight, level); };
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kDigits; ++p) {
          const ByteVec weight = broadcast(weights[r].four[j / 4][p]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) add_to_ranks(levels[v], p, weight, swapped, sums[v][r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      // Levels of 16 bits have 128 less in the tables.
      const float missing = Levels::kLevelDigits == 2 ? weights[r].total * 128 * weights[r].step : 0.0f;
      float* to = out + r * out_stride + n * kWidth;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v, to += Levels::kShift == 0 ? kWidth : kCodes) {
        store(to, load(to) + (join_ranks(sums[v][r]) * (weights[r].step * Levels::kFactor) + missing));
      }
    }
  }
}

// What a task keeps for products in integers.
struct IntegerProducts {
  QueryDigits queries[TQ_MAX_HEAD_DIM / TQ_NORM_GROUP][kMaxTaskRows];
  WeightDigits weights[kMaxTaskRows];
  PackedTile tile;
};

// What lies behind a tile, spread over its parts, of which this one has the numbers from `at` on and takes `steps`.
template <typename Rows>
Prefetch prefetch_for_part(const Rows& rows, Span span, int64_t count, int64_t head_dim, int64_t at, int64_t steps) {
  const int64_t bytes = count * span.stride / rows.count_packed(head_dim);
  return {span.first + count * span.stride + at / rows.kNumbersOfPacked * bytes, bytes / steps};
}

// Calls f with std::integral_constant<int, digits>.
template <int kLevelDigits, typename Function>
TQ_INLINE void with_digits(int digits, Function f) {
  if (kLevelDigits == 2 || digits == 2) return f(std::integral_constant<int, 2>());
  if constexpr (kLevelDigits == 1) f(std::integral_constant<int, 3>());
}

template <typename Rows>
void set_queries(const Rows& rows, const AttendTask& task, IntegerProducts& products) {
  const int64_t head_dim = task.params->head_dim, padded = padded_dim(head_dim);
  for (int64_t r = 0; r < task.rows; ++r) {
    alignas(64) float ordered[TQ_MAX_HEAD_DIM];
    rows.order(task.q + r * head_dim, ordered, kByteOrder);
    for (int64_t from = 0; from < padded; from += TQ_NORM_GROUP) {
      const int64_t dims = smaller(TQ_NORM_GROUP, padded - from);
      products.queries[from / TQ_NORM_GROUP][r].write(task.digits, rows.kLevelDigits, ordered + from, dims);
    }
  }
}

// Dot products of the queries with a tile's keys, dims from..to, as score_rows has them.
template <typename Rows>
void score_integers(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const AttendTask& task,
                    IntegerProducts& products, float* logits) {
  const int64_t steps = (count + 2 * kWidth - 1) / (2 * kWidth) * kWidth;
  rows.for_each_packed(from, to, [&](auto packed, int64_t at) {
    const Prefetch prefetch = prefetch_for_part(rows, span, count, task.params->head_dim, at, steps);
    read_columns(packed, span, count, products.tile);
    with_digits<Rows::kLevelDigits>(task.digits, [&](auto digits) {
      for_row_groups(task.rows, [&](int64_t r, auto group) {
        score_columns<decltype(group)::value, decltype(digits)::value, typename decltype(packed)::Levels>(
            rows.table, products.tile, count, at - from, products.queries[from / TQ_NORM_GROUP] + r, prefetch,
            logits + r * kLogitRow);
      });
    });
  });
}

// Adds weights[r * kLogitRow + j] * row j to out, dims from..to in the order of kWovenOrder. Up to a multiple of
// kWidth, weights after the last row are zero. Returns false, and adds nothing, if a weight is negative, infinite or
// none.
template <typename Rows>
bool add_integers(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const AttendTask& task,
                  const float* weights, IntegerProducts& products, float* out, int64_t out_stride) {
  const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
  float largest[kMaxTaskRows], sum = 0.0f;
  for (int64_t r = 0; r < task.rows; ++r) {
    largest[r] = largest_weight(weights + r * kLogitRow, padded);
    sum += largest[r] * 0.0f;
  }
  if (sum != 0.0f) return false;
  for (int64_t r = 0; r < task.rows; ++r) {
    products.weights[r].write(task.digits, rows.kLevelDigits, weights + r * kLogitRow, padded, largest[r]);
  }
  rows.for_each_packed(from, to, [&](auto packed, int64_t at) {
    const int64_t steps = (count + 3) / 4 * (decltype(packed)::Levels::kShift == 0 ? 2 : 4);
    const Prefetch prefetch = prefetch_for_part(rows, span, count, task.params->head_dim, at, steps);
    read_woven(packed, span, count, products.tile);
    with_digits<Rows::kLevelDigits>(task.digits, [&](auto digits) {
      for_row_groups(task.rows, [&](int64_t r, auto group) {
        add_woven<decltype(group)::value, decltype(digits)::value, typename decltype(packed)::Levels>(
            rows.table, products.tile, count, products.weights + r, prefetch, out + r * out_stride + at, out_stride);
      });
    });
  });
  return true;
}
#else
struct IntegerProducts {};
#endif
