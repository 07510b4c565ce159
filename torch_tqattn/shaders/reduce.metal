// Merges the parts of attend.metal: one lane group a query row. Undoes the rotation, and puts rows where the caller
// wants them.
//
// Specialised by: TQ_HEAD_DIM, TQ_OUTPUT.
#include <metal_stdlib>
using namespace metal;

#include "params.h"
#include "state.h"

// Row n of the parts, in the order of attend.metal, is sequence, KV head, token, head of its group; in `out` it is
// sequence, head, token.
kernel void tq_reduce(device const float* partials [[buffer(0)]], device const float* sinks [[buffer(1)]],
                      device TQ_OUTPUT* out [[buffer(2)]], device float* lse [[buffer(3)]],
                      constant TqReduceParams& params [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint index = (group * simdgroups + simdgroup) * TQ_SIMD_ROWS + lane / TQ_ROW_LANES;
  const uint row = min(index, params.rows - 1);
  const uint heads_per_kv = params.num_heads / params.num_kv_heads;
  const uint token = row / heads_per_kv % params.q_len;
  const uint kv_head = row / (heads_per_kv * params.q_len);  // of all sequences
  const uint head = kv_head * heads_per_kv + row % heads_per_kv;
  const ulong to = ulong(head) * params.q_len + token;

  TqState state;
  tq_start(state);
  if (params.has_sinks != 0) {  // a logit with a weight and no value
    state.largest = sinks[head % params.num_heads];
    state.sum = 1.0f;
  }
  device const float* sums = partials + (ulong(params.rows) * TQ_HEAD_DIM + ulong(row) * 2) * params.splits;
  for (uint split = 0; split < params.splits; ++split) {
    if (sums[2 * split] == 0.0f) continue;
    TqRow part;
    tq_load(partials + (ulong(row) * params.splits + split) * TQ_HEAD_DIM, lane, part);
    tq_merge(sums[2 * split + 1], sums[2 * split], part, state);
  }
  tq_scale(state.sum != 0.0f ? 1.0f / state.sum : 0.0f, state.out);
  if (params.undo_rotation != 0) tq_undo_rotation(lane, state.out);
  if (index >= params.rows) return;
  tq_store(out + to * TQ_HEAD_DIM, lane, state.out);
  if (params.has_lse != 0 && tq_place(lane) == 0) {
    lse[to] = state.sum == 0.0f ? -INFINITY : state.largest + precise::log(state.sum);
  }
}
