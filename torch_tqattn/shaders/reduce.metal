// Merges the parts of attend.metal: one simdgroup a query row, whose lane groups take parts in turn. Undoes the
// rotation, and puts rows where the caller wants them.
//
// Specialised by: TQ_HEAD_DIM, TQ_OUTPUT, TQ_WIDE: whether the parts begin at a multiple of 16 bytes.
#include <metal_stdlib>
using namespace metal;

#define TQ_SPREAD_ROWS
#include "finish.h"
#include "order.h"
#include "params.h"
#include "state.h"

#define TQ_AT_ONCE (TQ_LANE_DIMS < 16 ? 16u : 8u)  // parts that a lane group reads before it adds them

static inline void tq_load_part(device const float* part, uint lane, thread TqRow& row) {
#if TQ_WIDE
  tq_clear(row);
  if (!tq_is_used(lane)) return;
  device const float2* two = reinterpret_cast<device const float2*>(part + tq_place(lane) * TQ_LANE_DIMS);
  device const float4* four = reinterpret_cast<device const float4*>(two);
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS / 4; ++i) {
    const float4 numbers = four[i];
    row.x[4 * i] = numbers.x;
    row.x[4 * i + 1] = numbers.y;
    row.x[4 * i + 2] = numbers.z;
    row.x[4 * i + 3] = numbers.w;
  }
  if (TQ_LANE_DIMS % 4 != 0) {
    const float2 numbers = *two;
    row.x[0] = numbers.x;
    row.x[1] = numbers.y;
  }
#else
  tq_load(part, lane, row);
#endif
}

// Every TQ_SIMD_ROWS-th part from `first` on; the last one again where there are no more.
static inline void tq_load_parts(device const float* parts, uint first, uint count, uint lane,
                                 thread TqRow (&rows)[TQ_AT_ONCE]) {
#pragma unroll
  for (uint i = 0; i < TQ_AT_ONCE; ++i) {
    tq_load_part(parts + min(first + i * TQ_SIMD_ROWS, count - 1) * TQ_HEAD_DIM, lane, rows[i]);
  }
}

// The sum of a part's weights, and its largest logit; no weight if there is no such part.
struct TqScale {
  float sum;
  float largest;
};

static inline TqScale tq_load_scale(device const float* sums, uint split, uint count) {
  TqScale scale;
  const uint used = min(split, count - 1);
  const float sum = sums[2 * used], largest = sums[2 * used + 1];
  scale.sum = split < count ? sum : 0.0f;
  scale.largest = scale.sum != 0.0f ? largest : TQ_NO_LOGIT;
  return scale;
}

// Row n of the parts, in the order of attend.metal, is sequence, KV head, token, head of its group; in `out` it is
// sequence, head, token.
kernel void tq_reduce(device const float* partials [[buffer(0)]], device const float* sinks [[buffer(1)]],
                      device TQ_OUTPUT* out [[buffer(2)]], device float* lse [[buffer(3)]],
                      constant TqReduceParams& params [[buffer(4)]], constant TqFinishParams& finish [[buffer(5)]],
                      uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint row = group * simdgroups + simdgroup;
  if (row >= params.rows) return;
  const uint heads_per_kv = params.num_heads / params.num_kv_heads;
  const uint token = row / heads_per_kv % params.q_len;
  const uint kv_head = row / (heads_per_kv * params.q_len);  // of all sequences
  const uint head = kv_head * heads_per_kv + row % heads_per_kv;
  const ulong to = ulong(head) * params.q_len + token;

  const uint signs = tq_signs(lane);

  tq_wait_for_earlier_kernels();
  // The largest logit comes first, so that the parts need not wait for each other; and parts are read before it is
  // known.
  device const float* sums = partials + (ulong(params.rows) * TQ_HEAD_DIM + ulong(row) * 2) * params.splits;
  device const float* first_part = partials + ulong(row) * params.splits * TQ_HEAD_DIM;
  const uint lane_group = lane / TQ_ROW_LANES;
  const float sink = finish.has_sinks != 0 ? sinks[head % params.num_heads] : TQ_NO_LOGIT;
  TqRow parts[TQ_AT_ONCE];
  tq_load_parts(first_part, lane_group, params.splits, lane, parts);
  TqScale scale = tq_load_scale(sums, lane, params.splits);
  TqState state;
  tq_start(state);
  state.largest = max(sink, scale.largest);  // a sink is a logit with a weight and no value
  for (uint split = lane + TQ_SIMD_LANES; split < params.splits; split += TQ_SIMD_LANES) {
    state.largest = max(state.largest, tq_load_scale(sums, split, params.splits).largest);
  }
#pragma unroll
  for (uint step = 1; step < TQ_SIMD_LANES; step *= 2) {
    state.largest = max(state.largest, simd_shuffle_xor(state.largest, ushort(step)));
  }
  float factor = 0.0f;
  for (uint first = 0; first < params.splits;) {
    // Lane n has the factor of the n-th of 32 parts.
    if (first % TQ_SIMD_LANES == 0) {
      if (first != 0) scale = tq_load_scale(sums, first + lane, params.splits);
      factor = scale.sum != 0.0f ? tq_decay(scale.largest, state.largest) : 0.0f;
      state.sum += scale.sum * factor;
    }
#pragma unroll
    for (uint i = 0; i < TQ_AT_ONCE; ++i) {
      const float its = simd_shuffle(factor, ushort(first % TQ_SIMD_LANES + i * TQ_SIMD_ROWS + lane_group));
      if (its != 0.0f) tq_add(its, parts[i], state.out);  // else there are no numbers, perhaps
    }
    first += TQ_AT_ONCE * TQ_SIMD_ROWS;
    if (first < params.splits) tq_load_parts(first_part, first + lane_group, params.splits, lane, parts);
  }
#pragma unroll
  for (uint step = 1; step < TQ_SIMD_LANES; step *= 2) state.sum += simd_shuffle_xor(state.sum, ushort(step));
#pragma unroll
  for (uint step = TQ_ROW_LANES; step < TQ_SIMD_LANES; step *= 2) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) state.out.x[i] += simd_shuffle_xor(state.out.x[i], ushort(step));
  }
  if (finish.has_sinks != 0) state.sum += tq_decay(sink, state.largest);
  tq_finish(state, finish, lane, signs, lane_group == 0, to, out, lse);
}
