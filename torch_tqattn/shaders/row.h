// A row of TQ_HEAD_DIM numbers, held by a group of TQ_ROW_LANES neighbouring lanes of a simdgroup: each has the
// TQ_LANE_DIMS numbers from TQ_LANE_DIMS * its place in the group on, 16 of them unless a shader defines
// TQ_SPREAD_ROWS: then all lanes hold one row, which takes fewer instructions. A simdgroup holds TQ_SIMD_ROWS rows at
// once. Where the head dim is no power of two the group's last lanes hold zeros, and take part in every exchange all
// the same.
#pragma once

#include "tables.h"

#define TQ_SIMD_LANES 32u

#if defined(TQ_SPREAD_ROWS) && (TQ_HEAD_DIM == 64 || TQ_HEAD_DIM == 128 || TQ_HEAD_DIM == 256)
#define TQ_LANE_DIMS (TQ_HEAD_DIM / 32u)
#define TQ_ROW_LANES 32u
#else
#define TQ_LANE_DIMS 16u
#if TQ_HEAD_DIM == 64
#define TQ_ROW_LANES 4u
#elif TQ_HEAD_DIM == 80 || TQ_HEAD_DIM == 96 || TQ_HEAD_DIM == 128
#define TQ_ROW_LANES 8u
#elif TQ_HEAD_DIM == 192 || TQ_HEAD_DIM == 256
#define TQ_ROW_LANES 16u
#elif TQ_HEAD_DIM == 512
#define TQ_ROW_LANES 32u
#else
#error "TQ_HEAD_DIM is not one of TQ_HEAD_DIMS"
#endif
#endif

// The factor of the head dim whose Hadamard matrix is not a power of two, and what is left of it.
#if TQ_HEAD_DIM == 80
#define TQ_ODD_ORDER 20u
#elif TQ_HEAD_DIM == 96 || TQ_HEAD_DIM == 192
#define TQ_ODD_ORDER 12u
#else
#define TQ_ODD_ORDER 1u
#endif

#define TQ_USED_LANES (TQ_HEAD_DIM / TQ_LANE_DIMS)
#define TQ_SIMD_ROWS (TQ_SIMD_LANES / TQ_ROW_LANES)
#define TQ_NORM_GROUPS ((TQ_HEAD_DIM + TQ_NORM_GROUP - 1) / TQ_NORM_GROUP)
#define TQ_GROUP_LANES (TQ_ROW_LANES / TQ_NORM_GROUPS)  // lanes that share a norm

// One lane's part of a row.
struct TqRow {
  float x[TQ_LANE_DIMS];
};

static inline uint tq_place(uint lane) { return lane % TQ_ROW_LANES; }

static inline bool tq_is_used(uint lane) { return tq_place(lane) < TQ_USED_LANES; }

static inline void tq_clear(thread TqRow& row) {
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = 0.0f;
}

static inline void tq_scale(float factor, thread TqRow& row) {
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] *= factor;
}

static inline void tq_add(float factor, thread const TqRow& row, thread TqRow& out) {
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) out.x[i] = fma(factor, row.x[i], out.x[i]);
}

// The sum of what the `lanes` neighbouring lanes (a power of two) have, in all of them.
static inline float tq_sum(float x, uint lanes) {
#pragma unroll
  for (uint step = 1; step < TQ_ROW_LANES; step *= 2) {
    if (step < lanes) x += simd_shuffle_xor(x, ushort(step));
  }
  return x;
}

static inline float tq_max(float x, uint lanes) {
#pragma unroll
  for (uint step = 1; step < TQ_ROW_LANES; step *= 2) {
    if (step < lanes) x = max(x, simd_shuffle_xor(x, ushort(step)));
  }
  return x;
}

// Loading and storing. `row` points to the row's first number; lanes that are not used read zeros and write nothing.

template <typename T>
static inline void tq_load(device const T* row, uint lane, thread TqRow& out) {
  if (tq_is_used(lane)) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) out.x[i] = float(row[tq_place(lane) * TQ_LANE_DIMS + i]);
  } else {
    tq_clear(out);
  }
}

template <typename T>
static inline void tq_store(device T* row, uint lane, thread const TqRow& in) {
  if (tq_is_used(lane)) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) row[tq_place(lane) * TQ_LANE_DIMS + i] = T(in.x[i]);
  }
}

// A dense row is half precision: finite numbers stay finite, infinities and NaN stay what they are.
static inline float tq_saturated(float x) {
  const bool is_finite = x - x == 0.0f;
  return is_finite ? clamp(x, -TQ_HALF_MAX, TQ_HALF_MAX) : x;
}

static inline void tq_store_half(device half* row, uint lane, thread const TqRow& in) {
  TqRow saturated;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) saturated.x[i] = tq_saturated(in.x[i]);
  tq_store(row, lane, saturated);
}

// Rotation

// Bit i: this lane's number i is negated. From memory, so that a kernel asks for it before it waits for others.
static inline uint tq_signs(uint lane) {
  const uint first = tq_place(lane) * TQ_LANE_DIMS;
  return kSignWords[first / 32] >> first % 32;
}

static inline void tq_apply_signs(uint signs, thread TqRow& row) {
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = ((signs >> i) & 1u) != 0u ? -row.x[i] : row.x[i];
}

// Sums and differences of numbers `step` apart, for all steps below `count` (a power of two, at most 16) of one lane.
static inline void tq_hadamard_in_lane(uint count, thread TqRow& row) {
#pragma unroll
  for (uint step = 1; step < TQ_LANE_DIMS; step *= 2) {
    if (step < count) {
#pragma unroll
      for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
        if ((i & step) == 0) {
          const float a = row.x[i], b = row.x[i + step];
          row.x[i] = a + b;
          row.x[i + step] = a - b;
        }
      }
    }
  }
}

#if TQ_ODD_ORDER > 1
// Entry (i, j) of the symmetric Hadamard matrix: a border of ones around the Legendre symbols of i + j.
static inline float tq_odd_entry(uint i, uint j) {
  const uint q = TQ_ODD_ORDER - 1;
  // Bit n: n is a square modulo q.
  const uint squares = TQ_ODD_ORDER == 12 ? 0x23Au : 0x30AF2u;
  if (i == 0 || j == 0) return 1.0f;
  return ((squares >> ((i + j - 2) % q)) & 1u) != 0u ? 1.0f : -1.0f;
}
#endif

// y = H x / sqrt(head dim): all lanes of the simdgroup call it together.
static inline void tq_hadamard(uint lane, thread TqRow& row) {
#if TQ_ODD_ORDER == 1
  tq_hadamard_in_lane(TQ_LANE_DIMS, row);
#pragma unroll
  for (uint step = 1; step < TQ_ROW_LANES; step *= 2) {
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = fma(sign, row.x[i], simd_shuffle_xor(row.x[i], ushort(step)));
  }
#else
  // Number 16 * place + i is in part (16 * place + i) / inner of TQ_ODD_ORDER parts: mixed within the parts by the
  // usual steps, then across them, every lane gathering what it needs from all.
  const uint inner = TQ_HEAD_DIM / TQ_ODD_ORDER;
  const uint parts = TQ_LANE_DIMS / inner;  // of one lane
  tq_hadamard_in_lane(inner, row);
  TqRow mixed;
  tq_clear(mixed);
  const uint first = lane - tq_place(lane);
  for (uint place = 0; place < TQ_USED_LANES; ++place) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) {
      const float x = simd_shuffle(row.x[i], ushort(first + place));
#pragma unroll
      for (uint part = 0; part < parts; ++part) {
        mixed.x[part * inner + i % inner] += tq_odd_entry(tq_place(lane) * parts + part, place * parts + i / inner) * x;
      }
    }
  }
  row = mixed;
  if (!tq_is_used(lane)) tq_clear(row);
#endif
  tq_scale(1.0f / precise::sqrt(float(TQ_HEAD_DIM)), row);
}

static inline void tq_rotate(uint lane, uint signs, thread TqRow& row) {
  tq_apply_signs(signs, row);
  tq_hadamard(lane, row);
}

static inline void tq_undo_rotation(uint lane, uint signs, thread TqRow& row) {
  tq_hadamard(lane, row);
  tq_apply_signs(signs, row);
}
