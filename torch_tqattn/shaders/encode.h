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

// A division would take its time, and would change the bytes of a NaN.
static inline float tq_stored_norm(float norm, thread const TqTarget& target) {
  return target.norm_factor == 1.0f ? norm : norm / target.norm_factor;
}

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
