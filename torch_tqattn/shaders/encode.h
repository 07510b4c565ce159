// What the kernels that store tokens share.
//
// Specialised by: TQ_INPUT, TQ_WIDE (whether the dense tails begin at a multiple of 16 bytes).
#pragma once

#include "params.h"
#include "store.h"
#include "words.h"

// Where one KV head of one side comes from and goes to.
struct TqTarget {
  device const TQ_INPUT* x;  // of the new tokens
  device uchar* codes;
  device float* norms;
  device half* means;
  device half* tail;
  int first;  // position of the first token that is no padding
  float norm_factor;
  uint signs;  // tq_signs
};

// A row of the tail.
static inline void tq_load_kept(device const half* row, uint lane, thread TqRow& out) {
#if TQ_WIDE
  uint words[TQ_LANE_DIMS / 2];
  tq_load_words(row, lane, words);
  tq_numbers_of_words(half(), lane, words, out);
#else
  tq_load(row, lane, out);
#endif
}

// Has memory fetched that is read once earlier kernels have ended.
static inline void tq_fetch_ahead(device const half* numbers) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(numbers));
#endif
}

// Whether what this lane has of a row is.
static inline bool tq_has_finite_lane(thread const TqRow& row) {
  float nothing[TQ_LANE_DIMS];
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) nothing[i] = row.x[i] - row.x[i];
#pragma unroll
  for (uint step = TQ_LANE_DIMS / 2; step > 0; step /= 2) {
#pragma unroll
    for (uint i = 0; i < step; ++i) nothing[i] += nothing[i + step];
  }
  return nothing[0] == 0.0f;
}

static inline bool tq_is_finite(thread const TqRow& row) {
  float nothing = 0.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) nothing += row.x[i] - row.x[i];
  return tq_sum(nothing, TQ_ROW_LANES) == 0.0f;
}

// What has been added up of a mean. Padding, sinks and tokens with a NaN or an infinity would spoil it for all others.
struct TqSum {
  TqRow row;
  float counted;
};

static inline void tq_add_row(bool counts, thread const TqRow& row, thread TqSum& sum) {
  sum.counted += counts ? 1.0f : 0.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) sum.row.x[i] += counts ? row.x[i] : 0.0f;
}

// Adds up what the rows of a simdgroup have, in all of its lanes.
static inline void tq_add_up_rows(thread TqSum& sum) {
#pragma unroll
  for (uint step = TQ_ROW_LANES; step < TQ_SIMD_LANES; step *= 2) {
    sum.counted += simd_shuffle_xor(sum.counted, ushort(step));
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) sum.row.x[i] += simd_shuffle_xor(sum.row.x[i], ushort(step));
  }
}

// Puts a new token, rotated, where it waits to be coded, and among the first tokens if it is one of those.
static inline void tq_keep_row(int position, bool is_there, int first, device half* tail,
                               constant TqEncodeParams& params, uint lane, thread TqRow& row) {
  if (position < first) tq_clear(row);
  const bool is_sink = tq_is_sink(position, first, params.sink_length);
  if (is_there && is_sink) tq_store_half(tail + uint(position - first) * TQ_HEAD_DIM, lane, row);
  if (is_sink) tq_clear(row);  // its row of the ring is not read
  if (is_there && params.block_size != 0 && position >= int(params.coded_end)) {
    tq_store_half(tail + tq_ring_row(position, params.sink_length, params.tail_slots) * TQ_HEAD_DIM, lane, row);
  }
}
