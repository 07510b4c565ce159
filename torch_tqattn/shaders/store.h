// Reading a cache: one KV head of one side, and the numbers of one of its coded slots.
#pragma once

#include "codes.h"

// Bytes of a slot: of its codes, or of its half-precision numbers (16 bits).
#define TQ_SLOT_BYTES(bits, low, high) ((bits) == 16 ? 2 * TQ_HEAD_DIM : TQ_ROW_BYTES(low, high))

struct TqStore {
  device const uchar* codes;
  device const float* norms;
  device const half* means;
  device const half* tail;
};

// `head` is sequence * KV heads + KV head, mean_ring how many means it has.
template <uint bits, uint low, uint high>
static inline TqStore tq_store_of_head(device const uchar* codes, device const float* norms, device const half* means,
                                       device const half* tail, ulong head, uint slots, uint mean_ring,
                                       uint tail_rows) {
  TqStore store;
  store.codes = codes + head * slots * TQ_SLOT_BYTES(bits, low, high);
  store.norms = norms + head * slots * TQ_NORM_GROUPS;
  store.means = means + head * mean_ring * TQ_HEAD_DIM;
  store.tail = tail + head * tail_rows * TQ_HEAD_DIM;
  return store;
}

// 16 numbers of a row, which are row * norm.
struct TqNumbers {
  TqRow row;
  float norm;
};

template <uint bits, uint low, uint high>
static inline void tq_load_slot(thread const TqStore& store, uint slot, uint lane, thread TqNumbers& numbers) {
  if (bits == 16) {
    tq_load(reinterpret_cast<device const half*>(store.codes) + slot * TQ_HEAD_DIM, lane, numbers.row);
    numbers.norm = 1.0f;
  } else {
    TqCodes codes;
    tq_load_codes<(bits == 16 ? 8 : bits), low, high>(store.codes + slot * TQ_ROW_BYTES(low, high), lane, codes);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) numbers.row.x[i] = tq_level<bits>(codes.x[i]);
    numbers.norm = store.norms[slot * TQ_NORM_GROUPS + tq_place(lane) / TQ_GROUP_LANES];
  }
}

// A row of the dense tail.
static inline void tq_load_tail(thread const TqStore& store, uint at, uint lane, thread TqNumbers& numbers) {
  tq_load(store.tail + at * TQ_HEAD_DIM, lane, numbers.row);
  numbers.norm = 1.0f;
}

// Where positions are in the dense tail: `first` is the sequence's first that is no padding, ring the tail's rows for
// the newest tokens, which come after those of the first tokens.
static inline bool tq_is_sink(int position, int first, uint sink_length) {
  return position >= first && position < first + int(sink_length);
}

static inline uint tq_ring_row(int position, uint sink_length, uint ring) {
  return sink_length + uint(position) % ring;
}

static inline uint tq_tail_row(int position, int first, uint sink_length, uint ring) {
  return tq_is_sink(position, first, sink_length) ? uint(position - first) : tq_ring_row(position, sink_length, ring);
}
