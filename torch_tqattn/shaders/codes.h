// Codes of a row: unpacking, the levels that they stand for, and coding. A storage format is given by the bits of its
// code and of its two planes (TQ_CODED_FORMATS in tables.h); TQ_EXACT_LEVELS chooses the seed-shaped operators' levels.
#pragma once

#include "guess.h"
#include "row.h"

// Bytes of a row of codes.
#define TQ_ROW_BYTES(low, high) \
  ((TQ_HEAD_DIM * (low) / 8 + TQ_HEAD_DIM * (high) / 8 + TQ_ROW_ALIGNMENT - 1) / TQ_ROW_ALIGNMENT * TQ_ROW_ALIGNMENT)

// One lane's part of a row of codes.
struct TqCodes {
  uint x[TQ_LANE_DIMS];
};

// Adds one plane of `bits` bits, shifted. `plane` is this lane's part, aligned to its size up to 4 bytes.
template <uint bits>
static inline void tq_add_plane(device const uchar* plane, uint shift, thread TqCodes& codes) {
  const uint per_word = 32u / bits;
  if (bits == 1) {
    const uint word = *reinterpret_cast<device const ushort*>(plane);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) codes.x[i] |= ((word >> i) & 1u) << shift;
  } else {
#pragma unroll
    for (uint w = 0; w < TQ_LANE_DIMS / per_word; ++w) {
      const uint word = reinterpret_cast<device const uint*>(plane)[w];
#pragma unroll
      for (uint i = 0; i < per_word; ++i) {
        codes.x[w * per_word + i] |= ((word >> (bits * i)) & ((1u << bits) - 1u)) << shift;
      }
    }
  }
}

// This lane's codes of a row; those of the row's first lane where it has none.
template <uint bits, uint low, uint high>
static inline void tq_load_codes(device const uchar* row, uint lane, thread TqCodes& codes) {
  const uint place = tq_is_used(lane) ? tq_place(lane) : 0u;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) codes.x[i] = 0;
  tq_add_plane<low>(row + place * (TQ_LANE_DIMS * low / 8), 0, codes);
  if (high != 0) {
    tq_add_plane<(high != 0 ? high : 1)>(row + TQ_HEAD_DIM * low / 8 + place * (TQ_LANE_DIMS * high / 8), low, codes);
  }
  if (bits < low) {  // whatever a foreign buffer holds
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) codes.x[i] &= (1u << bits) - 1u;
  }
}

// What codes stand for, up to the factor tq_level_scale.
template <uint bits>
static inline float tq_level(uint code) {
#if TQ_EXACT_LEVELS
  if (bits == 4) return kExactLevels4[code];
  if (bits == 5) return kExactLevels5[code];
  if (bits == 6) return kExactLevels6[code];
  return kExactLevels8[code];
#else
  if (bits == 2) return float(kLevels2[code]);
  if (bits == 3) return float(kLevels3[code]);
  if (bits == 4) return float(kLevels4[code]);
  if (bits == 5) return float(kLevels5[code]);
  if (bits == 6) return float(kLevels6[code]);
  return float(kLevels8[code]);
#endif
}

template <uint bits>
static inline float tq_level_scale() {
#if TQ_EXACT_LEVELS
  return 1.0f;
#else
  if (bits == 2) return kLevelScale2;
  if (bits == 3) return kLevelScale3;
  if (bits == 4) return kLevelScale4;
  if (bits == 5) return kLevelScale5;
  if (bits == 6) return kLevelScale6;
  return kLevelScale8;
#endif
}

// Between the levels of code i and code i + 1.
template <uint bits>
static inline float tq_threshold(uint i) {
#if TQ_EXACT_LEVELS
  if (bits == 4) return kExactThresholds4[i];
  if (bits == 5) return kExactThresholds5[i];
  if (bits == 6) return kExactThresholds6[i];
  return kExactThresholds8[i];
#else
  if (bits == 2) return kThresholds2[i];
  if (bits == 3) return kThresholds3[i];
  if (bits == 4) return kThresholds4[i];
  if (bits == 5) return kThresholds5[i];
  if (bits == 6) return kThresholds6[i];
  return kThresholds8[i];
#endif
}

// A codebook as an encoder reads it: the shaders' own tables.
template <uint bits>
struct TqConstantBook {
  float threshold(uint i) const { return tq_threshold<bits>(i); }
  float level(uint code) const { return tq_level<bits>(code) * tq_level_scale<bits>(); }
};

// How many thresholds lie below x * inverse, inverse being 1 / multiplier: the code of the nearest level.
template <uint bits, typename Book>
static inline uint tq_nearest(float x, float multiplier, float inverse, thread const Book& book) {
  const uint last = (1u << bits) - 2;
  const float most = tq_threshold<bits>(last);
  // Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the low bits.
  const float rounded = tq_guess<int(bits)>(clamp(x * inverse, -most, most)) + (12582912.0f + float(last / 2));
  const uint index = as_type<uint>(rounded) & ((1u << bits) - 1u);
  return index + (x > book.threshold(index) * multiplier ? 1u : 0u);
}

// `plane` is the row's. All lanes of its group call it together: where a lane has less than a byte, some share one.
template <uint bits>
static inline void tq_store_plane(device uchar* plane, uint shift, uint lane, thread const TqCodes& codes) {
  const uint lane_bits = bits * TQ_LANE_DIMS, per_word = lane_bits < 32 ? TQ_LANE_DIMS : 32u / bits,
             place = tq_place(lane);
  uint words[TQ_LANE_DIMS / per_word];
#pragma unroll
  for (uint w = 0; w < TQ_LANE_DIMS / per_word; ++w) {
    words[w] = 0;
#pragma unroll
    for (uint i = 0; i < per_word; ++i) {
      words[w] |= ((codes.x[w * per_word + i] >> shift) & ((1u << bits) - 1u)) << (bits * i);
    }
  }
  const uint sharing = lane_bits < 8 ? 8 / lane_bits : 1;
  words[0] <<= place % sharing * lane_bits;
#pragma unroll
  for (uint step = 1; step < sharing; step *= 2) words[0] |= simd_shuffle_xor(words[0], ushort(step));
  if (!tq_is_used(lane) || place % sharing != 0) return;
  if (lane_bits == 16) {
    reinterpret_cast<device ushort*>(plane)[place] = ushort(words[0]);
  } else if (lane_bits < 16) {
    plane[place / sharing] = uchar(words[0]);
  } else {
    device uint* to = reinterpret_cast<device uint*>(plane) + place * (lane_bits / 32);
#pragma unroll
    for (uint w = 0; w < TQ_LANE_DIMS / per_word; ++w) to[w] = words[w];
  }
}

// Writes this lane's codes; the row's last lane also clears the padding.
template <uint low, uint high>
static inline void tq_store_codes(device uchar* row, uint lane, thread const TqCodes& codes) {
  tq_store_plane<low>(row, 0, lane, codes);
  if (high != 0) tq_store_plane<(high != 0 ? high : 1)>(row + TQ_HEAD_DIM * low / 8, low, lane, codes);
  if (tq_place(lane) == TQ_USED_LANES - 1) {
    for (uint i = TQ_HEAD_DIM * low / 8 + TQ_HEAD_DIM * high / 8; i < TQ_ROW_BYTES(low, high); ++i) row[i] = 0;
  }
}

// How an encoder chooses codes and norms; csrc/format.h's Encode.
#define TQ_ENCODE_FAST 0u
#define TQ_ENCODE_BEST 1u
#define TQ_ENCODE_PLAIN 2u

// The squared length of the part of x at right angles to the levels of its codes, when x is quantised at this multiple
// of its scale: what is left over, less what another scale would still take off it.
template <uint bits, typename Book>
static inline float tq_angle_error(thread const TqRow& x, uint lane, float multiplier, thread const Book& book) {
  const float inverse = 1.0f / multiplier;
  float left = 0.0f, along = 0.0f, length = 0.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
    const float level = book.level(tq_nearest<bits>(x.x[i], multiplier, inverse, book));
    const float rest = x.x[i] - level * multiplier;
    if (tq_is_used(lane)) {
      left = fma(rest, rest, left);
      along = fma(rest, level, along);
      length = fma(level, level, length);
    }
  }
  left = tq_sum(left, TQ_GROUP_LANES);
  along = tq_sum(along, TQ_GROUP_LANES);
  length = tq_sum(length, TQ_GROUP_LANES);
  return left - along * along / length;
}

// Of the scale of x, the one among kScaleMultipliers that leaves the smallest angle between x and its levels.
template <uint bits, typename Book>
static inline float tq_best_multiplier(thread const TqRow& x, uint lane, thread const Book& book) {
  float multiplier = 1.0f, least = INFINITY;
  for (uint m = 0; m < sizeof(kScaleMultipliers) / sizeof(float); ++m) {
    const float error = tq_angle_error<bits>(x, lane, kScaleMultipliers[m], book);
    if (error < least) {
      least = error;
      multiplier = kScaleMultipliers[m];
    }
  }
  return multiplier;
}

// Codes of a row that the group holds, and what their levels are multiplied with in this lane's norm group: NaN if that
// has a NaN or an infinity. All lanes of the simdgroup call it together.
template <uint bits, typename Book>
static inline float tq_quantise(thread const TqRow& row, uint lane, uint encode, thread const Book& book,
                                thread TqCodes& codes) {
  const float size = float(TQ_HEAD_DIM / TQ_NORM_GROUPS);
  float sum = 0.0f, unit = 1.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) sum = fma(row.x[i], row.x[i], sum);
  sum = tq_sum(sum, TQ_GROUP_LANES);
  bool is_finite = true, is_number = true;
  TqRow normalised = row;
  // Squares that became zero, or infinite, do not matter between these; else all is scaled by the largest number.
  const bool is_usual = sum > 1.0e-20f && sum < 1.0e30f;
  if (simd_any(!is_usual)) {
    float peak = 0.0f, nothing = 0.0f, rest = 0.0f;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
      peak = max(peak, abs(row.x[i]));
      nothing += row.x[i] - row.x[i];
    }
    peak = tq_max(peak, TQ_GROUP_LANES);
    is_finite = tq_sum(nothing, TQ_GROUP_LANES) == 0.0f;
    is_number = is_finite && peak > 0.0f;
    if (!is_usual && is_number) unit = peak;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
      normalised.x[i] /= unit;
      rest = fma(normalised.x[i], normalised.x[i], rest);
    }
    rest = tq_sum(rest, TQ_GROUP_LANES);
    if (!is_usual) sum = rest;
    if (!is_number) {  // codes of zeros
      sum = size;
      tq_clear(normalised);
    }
  }
  const float root = precise::sqrt(sum / size), inverse_root = 1.0f / root;
  tq_scale(inverse_root, normalised);

  float multiplier = 1.0f;
  if (encode == TQ_ENCODE_BEST) multiplier = tq_best_multiplier<bits>(normalised, lane, book);
  const float inverse = 1.0f / multiplier;
  float length = 0.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
    codes.x[i] = tq_nearest<bits>(normalised.x[i], multiplier, inverse, book);
    const float level = book.level(codes.x[i]);
    if (tq_is_used(lane)) length = fma(level, level, length);
  }
  length = tq_sum(length, TQ_GROUP_LANES);
  if (!is_finite) return NAN;
  if (!is_number) return 0.0f;
  const float rms = unit * root;
  return encode == TQ_ENCODE_PLAIN ? rms : rms / precise::sqrt(length / size);
}
