// Rows of numbers as they lie in memory, one class for each way to hold them. What reads rows is written once, over:
//
//   head_dim       numbers in a row
//   for_each_part(from, to, f)  calls f(part, at) for each part of the row between dims `from` and `to`, multiples of
//                               TQ_NORM_GROUP or the end: part(row, x) reads part.kCount vectors of numbers, which are
//                               at .. at + kCount * kWidth in the rows' own order
//
// Codes come in an order that costs nothing to read; queries are put in that order once, and results put back once.
//
// Part of kernels_impl.h: compiled once for each instruction set.

#if defined(TQ_ISA_AVX2)
constexpr int kPartVectors = 2;  // 16 registers: 4 queries' sums of 2 vectors, and what they are made of
#else
constexpr int kPartVectors = 4;
#endif

constexpr int64_t kPrefetchBytes = 4096;  // how far ahead rows are fetched into the cache

// Codes are read kCodes at a time, up to this many: beyond a row's end, if head_dim is no multiple of kCodes.
int64_t padded_dim(int64_t head_dim) { return (head_dim + kCodes - 1) / kCodes * kCodes; }

template <int kVectors, typename Load>
struct NaturalPart {
  static constexpr int kCount = kVectors;
  int64_t at;
  TQ_INLINE void operator()(const uint8_t* row, FloatVec* x) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = Load()(row, at + v * kWidth);
  }
};

// Numbers in the order of dims.
template <typename Load>
struct NaturalRows {
  int64_t head_dim;

  static constexpr bool kIsInteger = false;

  template <typename Function>
  TQ_INLINE void for_each_part(int64_t from, int64_t to, Function f) const {
    int64_t at = from;
    for (; at + kPartVectors * kWidth <= to; at += kPartVectors * kWidth) f(NaturalPart<kPartVectors, Load>{at}, at);
    for (; at < to; at += kWidth) f(NaturalPart<1, Load>{at}, at);
  }

  void order(const float* x, float* y) const { std::memcpy(y, x, head_dim * sizeof(float)); }

  void add_natural(const float* y, float* x) const {
    for (int64_t i = 0; i < head_dim; ++i) x[i] += y[i];
  }
};

struct LoadHalf {
  TQ_INLINE FloatVec operator()(const uint8_t* row, int64_t at) const {
    return load_number(reinterpret_cast<const c10::Half*>(row) + at);
  }
};

struct LoadFloat {
  TQ_INLINE FloatVec operator()(const uint8_t* row, int64_t at) const {
    return load(reinterpret_cast<const float*>(row) + at);
  }
};

using HalfRows = NaturalRows<LoadHalf>;
using FloatRows = NaturalRows<LoadFloat>;

// How packed codes become levels: integers of up to kLevelDigits_ bytes, looked up by the lowest kBits of a code. Where
// kShift_ is not 0, a byte's second code lies that many bits above its first.
template <int kBits_, int kLevelDigits_, int kShift_>
struct PackedLevels {
  static constexpr int kBits = kBits_, kLevelDigits = kLevelDigits_, kShift = kShift_;
  static constexpr float kFactor = kLevelDigits == 2 ? 256 : 1;  // of sums of products without those of lowest digits
};

// Rows of codes: a plane of kLow bits a code, then one of what is left of kBits.
// `kIsInteger_`: whether levels are multiplied as integers, of 8 or 16 bits.
template <int kBits, int kLow, int kBytesOfLevel, bool kIsInteger_ = kHasDot && kBytesOfLevel == 2>
struct CodedRows {
  int64_t head_dim;
  const LevelTable& table;

  static constexpr bool kIsInteger = kIsInteger_;
  static constexpr int kLevelDigits = kBytesOfLevel - 1;

  static constexpr int kHigh = kLow == 8 ? 0 : kBits - kLow;
  // Where a byte has two codes, a vector of them is read at once, the even ones and then the odd ones.
  static constexpr int kPairs = kLow == 8 ? 1 : 2;

  // Codes at + kPerByte * i + kWhich, i = 0 .. kCodes; what the row has no codes for is anything.
  template <int kPerByte, int kWhich>
  TQ_INLINE ByteVec codes(const uint8_t* row, int64_t at) const {
    const uint8_t* low_plane = row + at * kLow / 8;
    if constexpr (kLow == 8) {
      return spread<1>(low_plane);
    } else {
      ByteVec codes = shift_right<kWhich * kLow>(spread<8 / (kLow * kPerByte)>(low_plane));
      if constexpr (kHigh != 0) {
        const ByteVec high = spread<8 / (kHigh * kPerByte)>(row + (head_dim * kLow + at * kHigh) / 8);
        constexpr uint8_t kLowMask = (1 << kLow) - 1, kHighMask = ((1 << kHigh) - 1) << kLow;
        codes = (codes & kLowMask) | (shift_right<kWhich * kHigh - kLow>(high) & kHighMask);
      }
      return codes;
    }
  }

  template <int kPerByte, int kWhich, int kHalf>
  struct Part {
    static constexpr int kCount = kPartVectors;
    const CodedRows& rows;
    int64_t at;
    TQ_INLINE void operator()(const uint8_t* row, FloatVec* x) const {
      if (kWhich == 0) __builtin_prefetch(row + at * kLow / 8 + kPrefetchBytes);
      const ByteVec codes = rows.codes<kPerByte, kWhich>(row, at);
      levels_of<kBits, kBytesOfLevel, kHalf>(rows.table, codes, x);
      if constexpr (kPartVectors == 4) levels_of<kBits, kBytesOfLevel, 1>(rows.table, codes, x + 2);
    }
  };

  // Bytes of one or two codes, as they are read: what is above a code is anything. The second ones are kCodes numbers
  // further in the rows' own order.
  template <int kPerByte, int kWhich, int kCodesOfByte>
  struct PackedCodes {
    using Levels = PackedLevels<(kBits <= 6 ? 6 : 8), kLevelDigits, (kCodesOfByte == 1 ? 0 : kLow)>;
    const CodedRows& rows;
    int64_t at;
    TQ_INLINE ByteVec read(const uint8_t* row) const { return rows.codes<kPerByte, kWhich>(row, at); }
  };

  // Calls f(packed, at) for each vector of packed codes between dims `from` and `to`, whose numbers are at, at + 1 ...
  template <typename Function>
  TQ_INLINE void for_each_packed(int64_t from, int64_t to, Function f) const {
    for_each_codes(from, to, [&](auto per_byte, auto which, int64_t first, int64_t at) TQ_LAMBDA_INLINE {
      constexpr int kPerByte = decltype(per_byte)::value, kWhich = decltype(which)::value;
      if constexpr (kHigh != 0 || kPerByte == 1) {
        f(PackedCodes<kPerByte, kWhich, 1>{*this, first}, at);
      } else if constexpr (kWhich == 0) {
        f(PackedCodes<kPerByte, 0, kPerByte>{*this, first}, at);
      }
    });
  }

  static constexpr int64_t kNumbersOfPacked = (kHigh != 0 ? 1 : kPairs) * kCodes;  // at most

  // How many vectors of packed codes `dims` dims are, or up to one more.
  static int64_t count_packed(int64_t dims) { return (dims + kNumbersOfPacked - 1) / kNumbersOfPacked; }

  template <typename Function>
  TQ_INLINE void for_each_part(int64_t from, int64_t to, Function f) const {
    for_each_codes(from, to, [&](auto per_byte, auto which, int64_t first, int64_t at) TQ_LAMBDA_INLINE {
      constexpr int kPerByte = decltype(per_byte)::value, kWhich = decltype(which)::value;
      f(Part<kPerByte, kWhich, 0>{*this, first}, at);
      if constexpr (kPartVectors == 2) f(Part<kPerByte, kWhich, 1>{*this, first}, at + 2 * kWidth);
    });
  }

  // Dims in the rows' own order, zeros where it has more.
  void order(const float* x, float* y, const CodeOrder& order = kLevelOrder) const {
    for_each_code(order, [&](int64_t i, int64_t dim) { y[i] = dim < head_dim ? x[dim] : 0.0f; });
  }

  // Adds numbers in the rows' own order to dims.
  void add_natural(const float* y, float* x, const CodeOrder& order = kLevelOrder) const {
    for_each_code(order, [&](int64_t i, int64_t dim) {
      if (dim < head_dim) x[dim] += y[i];
    });
  }

 private:
  // f(codes in a byte, which of them, first code, where their numbers go) for each vector of codes.
  template <typename Function>
  TQ_INLINE static void for_each_codes(int64_t from, int64_t to, Function f) {
    constexpr std::integral_constant<int, 0> zero;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    int64_t at = from;
    if constexpr (kPairs == 2) {
      for (; at + kCodes < to; at += 2 * kCodes) {
        f(two, zero, at, at);
        f(two, one, at, at + kCodes);
      }
    }
    for (; at < to; at += kCodes) f(one, zero, at, at);
  }

  template <typename Function>
  void for_each_code(const CodeOrder& order, Function f) const {
    for_each_codes(0, head_dim, [&](auto per_byte, auto which, int64_t first, int64_t at) {
      for (int64_t i = 0; i < kCodes; ++i) f(at + i, first + per_byte * order.code[i] + which);
    });
  }
};

// Calls f with the class of a side's rows of codes, for attention that keeps so many digits of its queries and weights.
template <typename Function>
void with_coded_rows(const HeadStore& store, int64_t head_dim, int digits, Function f) {
  constexpr bool kIsInteger = kHasDot;  // levels of 16 bits too, unless what is left out of their products would count
  const LevelTable& table = *store.levels;
  const bool is_exact = store.codebook->integers == nullptr;
  const int bits = store.codebook->bits, low = store.format->low_plane;
  if (is_exact && low == 4 && bits == 4) return f(CodedRows<4, 4, 4>{head_dim, table});
  if (low == 8 && bits == 5) return f(CodedRows<5, 8, 4>{head_dim, table});
  if (low == 8 && bits == 6) return f(CodedRows<6, 8, 4>{head_dim, table});
  if (is_exact && low == 8) return f(CodedRows<8, 8, 4>{head_dim, table});
  switch (bits) {
    case 2:
      return f(CodedRows<2, 2, 2>{head_dim, table});
    case 3:
      return f(CodedRows<3, 2, 2>{head_dim, table});
    case 4:
      return f(CodedRows<4, 4, 2>{head_dim, table});
    case 5:
      return f(CodedRows<5, 4, 2>{head_dim, table});
    case 6:
      if (digits == 2) return f(CodedRows<6, 4, 3, kIsInteger>{head_dim, table});
      return f(CodedRows<6, 4, 3>{head_dim, table});
    default:
      if (digits == 2) return f(CodedRows<8, 8, 3, kIsInteger>{head_dim, table});
      return f(CodedRows<8, 8, 3>{head_dim, table});
  }
}
