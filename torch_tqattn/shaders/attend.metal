// Attention over a compressed cache: one part of the positions for TQ_QUERIES queries that share a KV head.
//
// A group of TQ_ROW_LANES lanes takes one position at a time: each lane decodes 16 numbers of its key, the group adds
// up the logits, and each lane adds 16 numbers of its value. Every group keeps a softmax of its own (state.h) in
// registers, so that nothing is exchanged in the loop but the sums of the logits; the groups' states are merged at the
// end, then those of the simdgroups, and reduce.metal merges the parts.
//
// Specialised by: TQ_HEAD_DIM, TQ_QUERIES, TQ_INPUT, TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH
// (16, 16, 0 for half-precision rows), TQ_K_MEANS, TQ_V_MEANS, TQ_TAIL (whether there are block means, and a dense
// tail), TQ_EXACT_LEVELS.
#include <metal_stdlib>
using namespace metal;

#include "order.h"
#include "params.h"
#include "state.h"
#include "store.h"
#include "visible.h"

// What is needed of the queries; each lane has its part of them all.
struct TqQueries {
  TqRow q[TQ_QUERIES];    // rotated and scaled
  int begin[TQ_QUERIES];  // the positions that each may see
  int end[TQ_QUERIES];
  device const uchar* mask[TQ_QUERIES];  // of positions from params.start on
};

// q . row, in all lanes of the group.
static inline float tq_dot(thread const TqRow& q, thread const TqRow& row, float factor) {
  float sum = 0.0f;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) sum = fma(q.x[i], row.x[i], sum);
  return tq_sum(sum * factor, TQ_ROW_LANES);
}

// Adds positions begin..end to the states. The position `begin` is in row `row` of a ring of `ring` rows after the
// first `offset`; coded rows may have block means.
template <bool is_coded>
static inline void tq_walk(thread const TqQueries& queries, thread const TqStore& k, thread const TqStore& v,
                           constant TqAttendParams& params, uint lane, int begin, int end, uint row, uint ring,
                           uint offset, thread TqState (&states)[TQ_QUERIES]) {
  const bool has_k_means = is_coded && TQ_K_MEANS;
  const bool has_v_means = is_coded && TQ_V_MEANS;
  const float k_factor = is_coded && TQ_K_BITS != 16 ? tq_level_scale<TQ_K_BITS>() * params.k_norm_factor : 1.0f;
  const float v_factor = is_coded && TQ_V_BITS != 16 ? tq_level_scale<TQ_V_BITS>() * params.v_norm_factor : 1.0f;
  const int group = int(lane / TQ_ROW_LANES);
  int block_begin = begin;
  while (block_begin < end) {
    int block_end = end;
    if (has_k_means || has_v_means) {
      block_end = min(end, (block_begin / int(params.block_size) + 1) * int(params.block_size));
    }
    // A key's logit is that of its code and that of its block's mean.
    float mean_logit[TQ_QUERIES], block_weight[TQ_QUERIES];
#pragma unroll
    for (uint r = 0; r < TQ_QUERIES; ++r) {
      mean_logit[r] = 0.0f;
      block_weight[r] = 0.0f;
    }
    if (has_k_means) {
      TqRow mean;
      tq_load(k.means + row / params.block_size * TQ_HEAD_DIM, lane, mean);
#pragma unroll
      for (uint r = 0; r < TQ_QUERIES; ++r) mean_logit[r] = tq_dot(queries.q[r], mean, 1.0f);
    }
    for (int p = block_begin; p < block_end; p += int(TQ_SIMD_ROWS)) {
      const int position = p + group;
      const bool is_valid = position < block_end;
      uint slot = row + uint(is_valid ? position - block_begin : 0);
      slot = offset + (slot >= ring ? slot - ring : slot);
      TqNumbers numbers;
      if (is_coded) {
        tq_load_slot<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(k, slot, lane, numbers);
      } else {
        tq_load_tail(k, slot, lane, numbers);
      }
      float logits[TQ_QUERIES];
#pragma unroll
      for (uint r = 0; r < TQ_QUERIES; ++r) {
        logits[r] = tq_dot(queries.q[r], numbers.row, numbers.norm * k_factor) + mean_logit[r];
        if (params.softcap > 0.0f) logits[r] = params.softcap * precise::tanh(logits[r] / params.softcap);
      }
      if (!is_valid) continue;
      if (is_coded) {
        tq_load_slot<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(v, slot, lane, numbers);
      } else {
        tq_load_tail(v, slot, lane, numbers);
      }
#pragma unroll
      for (uint r = 0; r < TQ_QUERIES; ++r) {
        bool is_visible = position >= queries.begin[r] && position < queries.end[r];
        if (is_visible && params.mask_batch != 0) is_visible = queries.mask[r][position - int(params.start)] != 0;
        if (is_visible) {
          thread TqState& state = states[r];
          if (logits[r] > state.largest) {
            const float decay = tq_decay(state.largest, logits[r]);
            state.largest = logits[r];
            state.sum *= decay;
            block_weight[r] *= decay;
            tq_scale(decay, state.out);
          }
          const float weight = precise::exp(logits[r] - state.largest);
          state.sum += weight;
          block_weight[r] += weight;
          tq_add(weight * numbers.norm * v_factor, numbers.row, state.out);
        }
      }
    }
    if (has_v_means) {
      TqRow mean;
      tq_load(v.means + row / params.block_size * TQ_HEAD_DIM, lane, mean);
#pragma unroll
      for (uint r = 0; r < TQ_QUERIES; ++r) tq_add(block_weight[r], mean, states[r].out);
    }
    row += uint(block_end - block_begin);
    if (row >= ring) row -= ring;
    block_begin = block_end;
  }
}

// Merges the states of the simdgroup's lane groups; all of them have the result.
static inline void tq_merge_groups(thread TqState& state) {
#pragma unroll
  for (uint step = TQ_ROW_LANES; step < TQ_SIMD_LANES; step *= 2) {
    const float largest = simd_shuffle_xor(state.largest, ushort(step));
    const float sum = simd_shuffle_xor(state.sum, ushort(step));
    TqRow out;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) out.x[i] = simd_shuffle_xor(state.out.x[i], ushort(step));
    tq_merge(largest, sum, out, state);
  }
}

// Floats of threadgroup memory that one simdgroup's states take.
#define TQ_STATE_FLOATS (TQ_QUERIES * (TQ_HEAD_DIM + 2))

static inline void tq_put_states(thread const TqState (&states)[TQ_QUERIES], uint lane, threadgroup float* to) {
  if (lane >= TQ_USED_LANES) return;
#pragma unroll
  for (uint r = 0; r < TQ_QUERIES; ++r) {
    threadgroup float* place = to + r * (TQ_HEAD_DIM + 2);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) place[lane * TQ_LANE_DIMS + i] = states[r].out.x[i];
    if (lane == 0) {
      place[TQ_HEAD_DIM] = states[r].largest;
      place[TQ_HEAD_DIM + 1] = states[r].sum;
    }
  }
}

static inline void tq_merge_put_states(threadgroup const float* from, uint lane, thread TqState (&states)[TQ_QUERIES]) {
#pragma unroll
  for (uint r = 0; r < TQ_QUERIES; ++r) {
    threadgroup const float* place = from + r * (TQ_HEAD_DIM + 2);
    TqRow out;
    tq_clear(out);
    if (tq_is_used(lane)) {
#pragma unroll
      for (uint i = 0; i < TQ_LANE_DIMS; ++i) out.x[i] = place[tq_place(lane) * TQ_LANE_DIMS + i];
    }
    tq_merge(place[TQ_HEAD_DIM], place[TQ_HEAD_DIM + 1], out, states[r]);
  }
}

// One threadgroup: part `group.x` of the positions, tile group.y % tiles of the query rows of KV head group.y / tiles,
// in sequence group.z. A KV head's query rows are counted token by token, the heads of its group in each.
//
// scratch: TQ_STATE_FLOATS for half of the simdgroups.
kernel void tq_attend(device const TQ_INPUT* q [[buffer(0)]], device const uchar* k_codes [[buffer(1)]],
                      device const float* k_norms [[buffer(2)]], device const half* k_means [[buffer(3)]],
                      device const half* k_tail [[buffer(4)]], device const uchar* v_codes [[buffer(5)]],
                      device const float* v_norms [[buffer(6)]], device const half* v_means [[buffer(7)]],
                      device const half* v_tail [[buffer(8)]], device const uchar* mask [[buffer(9)]],
                      device const int* starts [[buffer(10)]], device const int* lengths [[buffer(11)]],
                      device float* partials [[buffer(12)]], constant TqAttendParams& params [[buffer(13)]],
                      threadgroup float* scratch [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint signs = tq_signs(lane);
  tq_wait_for_earlier_kernels();
  const uint heads_per_kv = params.num_heads / params.num_kv_heads;
  const uint rows = params.q_len * heads_per_kv;
  const uint tiles = (rows + TQ_QUERIES - 1) / TQ_QUERIES;
  const uint batch = group.z, kv_head = group.y / tiles, first_row = group.y % tiles * TQ_QUERIES;
  const int first = params.has_starts != 0 ? max(starts[batch], 0) : 0;
  int length = int(params.length);
  if (params.has_lengths != 0) length = clamp(lengths[batch], 0, length);

  TqQueries queries;
  TqState states[TQ_QUERIES];
  int begin = length, end = 0;
#pragma unroll
  for (uint r = 0; r < TQ_QUERIES; ++r) {
    // What is left of the last tile computes its last row again, and keeps it to itself.
    const uint row = min(first_row + r, rows - 1);
    const uint token = row / heads_per_kv, head = kv_head * heads_per_kv + row % heads_per_kv;
    const ulong at = (ulong(batch) * params.num_heads + head) * params.q_len + token;
    tq_load(q + at * TQ_HEAD_DIM, lane, queries.q[r]);
    if (params.rotate_q != 0) tq_rotate(lane, signs, queries.q[r]);
    tq_scale(params.scale, queries.q[r]);
    const TqVisible seen = tq_visible(params, batch, first, length, token);
    queries.begin[r] = seen.begin;
    queries.end[r] = seen.end;
    queries.mask[r] = mask + ulong(seen.mask_row) * (params.length - params.start);
    if (queries.begin[r] < queries.end[r]) {
      begin = min(begin, queries.begin[r]);
      end = max(end, queries.end[r]);
    }
    tq_start(states[r]);
  }

  const ulong store = ulong(batch) * params.num_kv_heads + kv_head;
  const uint tail_rows = params.sink_length + params.tail_slots;
  const TqStore k = tq_store_of_head<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(k_codes, k_norms, k_means, k_tail, store,
                                                                     params.slots, params.mean_ring, tail_rows);
  const TqStore v = tq_store_of_head<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(v_codes, v_norms, v_means, v_tail, store,
                                                                     params.slots, params.mean_ring, tail_rows);

  // This simdgroup's share.
  const int parts = int(params.splits * simdgroups), part = int(group.x * simdgroups + simdgroup);
  const int share = (max(end - begin, 0) + parts - 1) / parts;
  const int from = begin + min(part * share, max(end - begin, 0)), to = min(from + share, max(end, begin));
  int coded_begin = from, coded_end = to;
  if (TQ_TAIL) {
    // The first tokens, what has been coded, and the newest tokens.
    const int sinks_end = first + int(params.sink_length);
    coded_begin = clamp(sinks_end, from, to);
    coded_end = clamp(int(params.coded), coded_begin, to);
    if (from < coded_begin) {
      tq_walk<false>(queries, k, v, params, lane, from, coded_begin, uint(from - first), 0xffffffffu, 0, states);
    }
    if (coded_end < to) {
      tq_walk<false>(queries, k, v, params, lane, coded_end, to, uint(coded_end) % params.tail_slots, params.tail_slots,
                     params.sink_length, states);
    }
  }
  if (coded_begin < coded_end) {
    tq_walk<true>(queries, k, v, params, lane, coded_begin, coded_end, uint(coded_begin) % params.slots, params.slots,
                  0, states);
  }

#pragma unroll
  for (uint r = 0; r < TQ_QUERIES; ++r) tq_merge_groups(states[r]);
  // Simdgroups in halves: the upper one hands its states to the lower one.
  for (uint half_count = simdgroups / 2; half_count > 0; half_count /= 2) {
    const bool gives = simdgroup >= half_count && simdgroup < 2 * half_count;
    if (gives) tq_put_states(states, lane, scratch + (simdgroup - half_count) * TQ_STATE_FLOATS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup < half_count) tq_merge_put_states(scratch + simdgroup * TQ_STATE_FLOATS, lane, states);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // [all query rows, splits, head_dim], then [all query rows, splits, 2]: sums, sum of weights and largest logit.
  if (simdgroup != 0 || lane >= TQ_USED_LANES) return;
  const ulong all_rows = ulong(params.batch) * params.num_heads * params.q_len;
#pragma unroll
  for (uint r = 0; r < TQ_QUERIES; ++r) {
    if (first_row + r >= rows) continue;
    const ulong at = (store * rows + first_row + r) * params.splits + group.x;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) partials[at * TQ_HEAD_DIM + lane * TQ_LANE_DIMS + i] = states[r].out.x[i];
    if (lane == 0) {
      device float* sums = partials + all_rows * params.splits * TQ_HEAD_DIM + at * 2;
      sums[0] = states[r].sum;
      sums[1] = states[r].largest;
    }
  }
}
