// Codes to dense rows: one lane group a position, K and V in one launch.
//
// Specialised by: TQ_HEAD_DIM, TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH (16, 16, 0 for
// half-precision rows), TQ_K_MEANS, TQ_V_MEANS, TQ_TAIL, TQ_EXACT_LEVELS.
#include <metal_stdlib>
using namespace metal;

#include "order.h"
#include "params.h"
#include "store.h"

template <uint bits, uint low, uint high, bool has_means>
static inline void tq_decode_row(thread const TqStore& store, constant TqDecodeParams& params, int position, int first,
                                 uint lane, thread TqRow& row) {
  if (TQ_TAIL && (tq_is_sink(position, first, params.sink_length) || position >= int(params.coded))) {
    const uint at = tq_tail_row(position, first, params.sink_length, params.tail_slots);
    tq_load(store.tail + at * TQ_HEAD_DIM, lane, row);
    return;
  }
  const uint slot = uint(position) % params.slots;
  TqNumbers numbers;
  tq_load_slot<bits, low, high>(store, slot, lane, numbers);
  const float factor = numbers.norm * (bits == 16 ? 1.0f : tq_level_scale<bits>());
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = numbers.row.x[i] * factor;
  if (has_means) {
    TqRow mean;
    tq_load(store.means + slot / params.block_size * TQ_HEAD_DIM, lane, mean);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] += mean.x[i];
  }
}

// Positions params.start to params.length of head group.y (sequence * KV heads + KV head), side group.z.
kernel void tq_decode(device const uchar* k_codes [[buffer(0)]], device const float* k_norms [[buffer(1)]],
                      device const half* k_means [[buffer(2)]], device const half* k_tail [[buffer(3)]],
                      device const uchar* v_codes [[buffer(4)]], device const float* v_norms [[buffer(5)]],
                      device const half* v_means [[buffer(6)]], device const half* v_tail [[buffer(7)]],
                      device const int* starts [[buffer(8)]], device float* k_out [[buffer(9)]],
                      device float* v_out [[buffer(10)]], constant TqDecodeParams& params [[buffer(11)]],
                      uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  tq_wait_for_earlier_kernels();
  const bool is_k = group.z == 0;
  const uint row_index = (group.x * simdgroups + simdgroup) * TQ_SIMD_ROWS + lane / TQ_ROW_LANES;
  const uint rows = params.length - params.start;
  const bool is_there = row_index < rows;
  const int position = int(params.start + (is_there ? row_index : 0));
  const int first = params.has_starts != 0 ? max(starts[group.y / params.num_kv_heads], 0) : 0;
  const uint tail_rows = params.sink_length + params.tail_slots;
  const uint mean_ring = params.block_size != 0 ? params.slots / params.block_size : 1;
  TqRow row;
  if (is_k) {
    const TqStore store = tq_store_of_head<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(k_codes, k_norms, k_means, k_tail, group.y,
                                                                           params.slots, mean_ring, tail_rows);
    tq_decode_row<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_K_MEANS>(store, params, position, first, lane, row);
  } else {
    const TqStore store = tq_store_of_head<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(v_codes, v_norms, v_means, v_tail, group.y,
                                                                           params.slots, mean_ring, tail_rows);
    tq_decode_row<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH, TQ_V_MEANS>(store, params, position, first, lane, row);
  }
  if (position < first || !tq_is_used(lane)) tq_clear(row);
  if (params.undo_rotation != 0) tq_undo_rotation(lane, tq_signs(lane), row);
  if (is_there) tq_store((is_k ? k_out : v_out) + (ulong(group.y) * rows + row_index) * TQ_HEAD_DIM, lane, row);
}
