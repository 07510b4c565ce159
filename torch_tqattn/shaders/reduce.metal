// Merges the parts of attend.metal: one simdgroup a query row, whose lane groups take parts in turn. Undoes the
// rotation, and puts rows where the caller wants them.
//
// Specialised by: TQ_HEAD_DIM, TQ_OUTPUT.
#include <metal_stdlib>
using namespace metal;

#include "params.h"
#include "state.h"

#define TQ_AT_ONCE 4u  // parts that a lane group reads before it adds them

// Row n of the parts, in the order of attend.metal, is sequence, KV head, token, head of its group; in `out` it is
// sequence, head, token.
kernel void tq_reduce(device const float* partials [[buffer(0)]], device const float* sinks [[buffer(1)]],
                      device TQ_OUTPUT* out [[buffer(2)]], device float* lse [[buffer(3)]],
                      constant TqReduceParams& params [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint row = group * simdgroups + simdgroup;
  if (row >= params.rows) return;
  const uint heads_per_kv = params.num_heads / params.num_kv_heads;
  const uint token = row / heads_per_kv % params.q_len;
  const uint kv_head = row / (heads_per_kv * params.q_len);  // of all sequences
  const uint head = kv_head * heads_per_kv + row % heads_per_kv;
  const ulong to = ulong(head) * params.q_len + token;

  // The largest logit comes first, so that the parts need not wait for each other.
  device const float* sums = partials + (ulong(params.rows) * TQ_HEAD_DIM + ulong(row) * 2) * params.splits;
  TqState state;
  tq_start(state);
  if (params.has_sinks != 0) state.largest = sinks[head % params.num_heads];  // a logit with a weight and no value
  const uint lane_group = lane / TQ_ROW_LANES;
  for (uint split = lane; split < params.splits; split += TQ_SIMD_LANES) {
    if (sums[2 * split] != 0.0f) state.largest = max(state.largest, sums[2 * split + 1]);
  }
#pragma unroll
  for (uint step = 1; step < TQ_SIMD_LANES; step *= 2) {
    state.largest = max(state.largest, simd_shuffle_xor(state.largest, ushort(step)));
  }
  for (uint first = lane_group; first < params.splits; first += TQ_AT_ONCE * TQ_SIMD_ROWS) {
    TqRow parts[TQ_AT_ONCE];
    float part_sums[TQ_AT_ONCE], factors[TQ_AT_ONCE];
#pragma unroll
    for (uint i = 0; i < TQ_AT_ONCE; ++i) {
      const uint split = min(first + i * TQ_SIMD_ROWS, params.splits - 1);
      tq_load(partials + (ulong(row) * params.splits + split) * TQ_HEAD_DIM, lane, parts[i]);
      part_sums[i] = first + i * TQ_SIMD_ROWS < params.splits ? sums[2 * split] : 0.0f;
      factors[i] = part_sums[i] != 0.0f ? tq_decay(sums[2 * split + 1], state.largest) : 0.0f;
    }
#pragma unroll
    for (uint i = 0; i < TQ_AT_ONCE; ++i) {
      if (part_sums[i] == 0.0f) continue;  // and no numbers, perhaps
      state.sum += part_sums[i] * factors[i];
      tq_add(factors[i], parts[i], state.out);
    }
  }
#pragma unroll
  for (uint step = TQ_ROW_LANES; step < TQ_SIMD_LANES; step *= 2) {
    state.sum += simd_shuffle_xor(state.sum, ushort(step));
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) state.out.x[i] += simd_shuffle_xor(state.out.x[i], ushort(step));
  }
  if (params.has_sinks != 0) state.sum += tq_decay(sinks[head % params.num_heads], state.largest);
  tq_scale(state.sum != 0.0f ? 1.0f / state.sum : 0.0f, state.out);
  if (params.undo_rotation != 0) tq_undo_rotation(lane, state.out);
  if (lane_group != 0) return;
  tq_store(out + to * TQ_HEAD_DIM, lane, state.out);
  if (params.has_lse != 0 && lane == 0) {
    lse[to] = state.sum == 0.0f ? -INFINITY : state.largest + precise::log(state.sum);
  }
}
