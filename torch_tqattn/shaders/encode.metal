// Storing tokens: tq_encode codes what is due (blocks of tokens around their mean, or single tokens), tq_keep puts the
// others, and the first tokens of each sequence, into the dense tail. K and V in one launch: group.z is the side.
//
// Specialised by: TQ_HEAD_DIM, TQ_INPUT, TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH (16, 16, 0 for
// half-precision rows), TQ_K_MEANS, TQ_V_MEANS, TQ_TAIL (whether there are block means, and a dense tail),
// TQ_EXACT_LEVELS, TQ_WIDE (whether the dense tails begin at a multiple of 16 bytes).
#include <metal_stdlib>
using namespace metal;

#define TQ_SPREAD_ROWS
#include "encode.h"
#include "order.h"

#define TQ_AT_ONCE \
  (TQ_LANE_DIMS < 4 ? 8 : 32 / int(TQ_LANE_DIMS))  // rows of the tail that a lane reads before it adds them to a mean

// The rotated row of a position that has not been coded; half precision if it goes through the tail. All lanes of the
// simdgroup call it together.
static inline void tq_fetch(int position, thread const TqTarget& target, constant TqEncodeParams& params, uint lane,
                            thread TqRow& row) {
  const bool is_new = position >= int(params.position);
  if (is_new) {
    tq_load(target.x + ulong(position - int(params.position)) * TQ_HEAD_DIM, lane, row);
  } else {
    tq_clear(row);
  }
  if (simd_any(is_new)) tq_rotate(lane, target.signs, row);
  if (!is_new && TQ_TAIL) {
    const uint at = tq_tail_row(position, target.first, params.sink_length, params.tail_slots);
    tq_load_kept(target.tail + at * TQ_HEAD_DIM, lane, row);
  }
  if (is_new && TQ_TAIL && params.block_size != 0) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = float(half(tq_saturated(row.x[i])));
  }
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

// The mean of positions begin..end, rotated, as it is stored.
static inline void tq_block_mean(int begin, int end, thread const TqTarget& target, constant TqEncodeParams& params,
                                 uint lane, uint simdgroup, uint simdgroups, threadgroup float* scratch,
                                 thread TqRow& mean) {
  TqSum sum;
  tq_clear(sum.row);
  sum.counted = 0.0f;
  const int counted_begin = clamp(target.first + int(params.sink_length), begin, end);
  const int new_begin = clamp(int(params.position), counted_begin, end);
  const uint nearest = uint(counted_begin) % max(params.tail_slots, 1u);
  for (int run = begin + int(simdgroup * TQ_RUN); run < end; run += int(simdgroups * TQ_RUN)) {
    const int run_end = min(run + int(TQ_RUN), end), tail_end = min(run_end, new_begin);
    for (int at = run; at < tail_end && tail_end > counted_begin; at += TQ_AT_ONCE * int(TQ_SIMD_ROWS)) {
      const int position = at + int(lane / TQ_ROW_LANES);
      TqRow rows[TQ_AT_ONCE];
      bool is_waiting[TQ_AT_ONCE];
      float nothing = 0.0f;
#pragma unroll
      for (int i = 0; i < TQ_AT_ONCE; ++i) {
        const int after = position + i * int(TQ_SIMD_ROWS) - counted_begin;
        is_waiting[i] = after >= 0 && after < tail_end - counted_begin;
        uint row = nearest + (is_waiting[i] ? uint(after) : 0u);
        if (row >= params.tail_slots) row -= params.tail_slots;
        tq_load_kept(target.tail + (params.sink_length + row) * TQ_HEAD_DIM, lane, rows[i]);
      }
#pragma unroll
      for (int i = 0; i < TQ_AT_ONCE; ++i) {
#pragma unroll
        for (uint n = 0; n < TQ_LANE_DIMS; ++n) nothing += rows[i].x[n] - rows[i].x[n];
      }
      const bool are_finite = !simd_any(nothing != 0.0f);
#pragma unroll
      for (int i = 0; i < TQ_AT_ONCE; ++i) {
        const bool is_finite = are_finite || tq_is_finite(rows[i]);
        tq_add_row(is_waiting[i] && is_finite, rows[i], sum);
      }
    }
    for (int at = run; at < run_end && run_end > new_begin; at += int(TQ_SIMD_ROWS)) {
      if (at + int(TQ_SIMD_ROWS) <= new_begin) continue;
      const int position = at + int(lane / TQ_ROW_LANES);
      TqRow row;
      tq_fetch(clamp(position, new_begin, end - 1), target, params, lane, row);
      const bool is_there = position >= new_begin && position < end, is_finite = tq_is_finite(row);
      tq_add_row(is_there && is_finite, row, sum);
    }
  }
  tq_add_up_rows(sum);
  threadgroup float* mine = scratch + simdgroup * (TQ_HEAD_DIM + 1);
  if (lane < TQ_USED_LANES) {
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) mine[lane * TQ_LANE_DIMS + i] = sum.row.x[i];
    if (lane == 0) mine[TQ_HEAD_DIM] = sum.counted;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Simdgroups share the numbers, which they leave in the first one's place.
  for (uint dim = simdgroup * TQ_SIMD_LANES + lane; dim < TQ_HEAD_DIM; dim += simdgroups * TQ_SIMD_LANES) {
    float number = 0.0f, counted = 0.0f;
#pragma unroll 4
    for (uint s = 0; s < simdgroups; s += 2) {
      threadgroup const float* one = scratch + s * (TQ_HEAD_DIM + 1);
      threadgroup const float* other = one + TQ_HEAD_DIM + 1;
      number += one[dim] + other[dim];
      counted += one[TQ_HEAD_DIM] + other[TQ_HEAD_DIM];
    }
    scratch[dim] = float(half(tq_saturated(number / max(counted, 1.0f))));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tq_clear(mean);
  if (!tq_is_used(lane)) return;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) mean.x[i] = scratch[tq_place(lane) * TQ_LANE_DIMS + i];
}

// Codes rows from..to of positions begin..begin + count of one head.
template <uint bits, uint low, uint high, bool has_means>
static inline void tq_encode_rows(int begin, int count, int from, int to, thread const TqTarget& target,
                                  constant TqEncodeParams& params, uint lane, uint simdgroup, uint simdgroups,
                                  threadgroup float* scratch) {
  TqRow mean;
  tq_clear(mean);
  if (has_means) {
    tq_block_mean(begin, begin + count, target, params, lane, simdgroup, simdgroups, scratch, mean);
    if (from == 0 && simdgroup == 0 && lane < TQ_ROW_LANES) {
      tq_store_half(target.means + uint(begin) % params.slots / params.block_size * TQ_HEAD_DIM, lane, mean);
    }
  }
  const int stride = int(simdgroups * TQ_SIMD_ROWS);
  for (int at = from + int(simdgroup * TQ_SIMD_ROWS); at < to; at += stride) {
    const int position = begin + at + int(lane / TQ_ROW_LANES);
    const bool is_there = position < begin + to;
    TqRow row;
    tq_fetch(is_there ? position : begin, target, params, lane, row);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] -= mean.x[i];
    if (position < target.first + int(params.sink_length)) tq_clear(row);
    const uint slot = uint(position) % params.slots;
    if (bits == 16) {
      if (is_there) tq_store_half(reinterpret_cast<device half*>(target.codes) + slot * TQ_HEAD_DIM, lane, row);
    } else {
      TqCodes codes;
      const float norm = tq_quantise<bits>(row, lane, params.encode, TqConstantBook<bits>(), codes);
      if (is_there) {
        tq_store_codes<low, high>(target.codes + slot * TQ_ROW_BYTES(low, high), lane, codes);
        if (tq_is_used(lane) && tq_place(lane) % TQ_GROUP_LANES == 0) {
          target.norms[slot * TQ_NORM_GROUPS + tq_place(lane) / TQ_GROUP_LANES] = tq_stored_norm(norm, target);
        }
      }
    }
  }
}

// params.pieces threadgroups: positions params.coded_begin + params.unit * (group.x / params.pieces) on, as many as
// params.unit, of head group.y (sequence * KV heads + KV head), side group.z. Each finds their mean, and codes its
// piece. scratch: TQ_HEAD_DIM + 1 floats for each simdgroup, of which there is an even number.
[[max_total_threads_per_threadgroup(TQ_ENCODE_THREADS)]] kernel void tq_encode(
    device const TQ_INPUT* k [[buffer(0)]], device const TQ_INPUT* v [[buffer(1)]], device uchar* k_codes [[buffer(2)]],
    device float* k_norms [[buffer(3)]], device half* k_means [[buffer(4)]], device half* k_tail [[buffer(5)]],
    device uchar* v_codes [[buffer(6)]], device float* v_norms [[buffer(7)]], device half* v_means [[buffer(8)]],
    device half* v_tail [[buffer(9)]], device const int* starts [[buffer(10)]],
    constant TqEncodeParams& params [[buffer(11)]], threadgroup float* scratch [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint signs = tq_signs(lane);
  tq_wait_for_earlier_kernels();
  const bool is_k = group.z == 0;
  const ulong head = group.y;
  const ulong slots = head * params.slots;
  const ulong tail = head * (params.sink_length + params.tail_slots) * TQ_HEAD_DIM;
  const ulong mean = params.block_size != 0 ? head * (params.slots / params.block_size) * TQ_HEAD_DIM : 0;
  const ulong bytes =
      is_k ? TQ_SLOT_BYTES(TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH) : TQ_SLOT_BYTES(TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH);
  TqTarget target;
  target.x = (is_k ? k : v) + head * params.tokens * TQ_HEAD_DIM;
  target.codes = (is_k ? k_codes : v_codes) + slots * bytes;
  target.norms = (is_k ? k_norms : v_norms) + slots * TQ_NORM_GROUPS;
  target.means = (is_k ? k_means : v_means) + mean;
  target.tail = (is_k ? k_tail : v_tail) + tail;
  target.first = params.has_starts != 0 ? max(starts[group.y / params.num_kv_heads], 0) : 0;
  target.norm_factor = is_k ? params.k_norm_factor : params.v_norm_factor;
  target.signs = signs;
  const int begin = int(params.coded_begin + group.x / params.pieces * params.unit);
  const int count = min(int(params.unit), int(params.coded_end) - begin);
  const int piece = (count + int(params.pieces) - 1) / int(params.pieces);
  const int from = int(group.x % params.pieces) * piece, to = min(from + piece, count);
  if (is_k) {
    tq_encode_rows<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_K_MEANS>(begin, count, from, to, target, params, lane, simdgroup,
                                                               simdgroups, scratch);
  } else {
    tq_encode_rows<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH, TQ_V_MEANS>(begin, count, from, to, target, params, lane, simdgroup,
                                                               simdgroups, scratch);
  }
}

// New tokens that belong in the tail, in the same order of groups: params.kept of them a threadgroup.
kernel void tq_keep(device const TQ_INPUT* k [[buffer(0)]], device const TQ_INPUT* v [[buffer(1)]],
                    device half* k_tail [[buffer(2)]], device half* v_tail [[buffer(3)]],
                    device const int* starts [[buffer(4)]], constant TqEncodeParams& params [[buffer(5)]],
                    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint signs = tq_signs(lane);
  tq_wait_for_earlier_kernels();
  const ulong head = group.y;
  device const TQ_INPUT* x = (group.z == 0 ? k : v) + head * params.tokens * TQ_HEAD_DIM;
  device half* tail = (group.z == 0 ? k_tail : v_tail) + head * (params.sink_length + params.tail_slots) * TQ_HEAD_DIM;
  const int first = params.has_starts != 0 ? max(starts[group.y / params.num_kv_heads], 0) : 0;
  const uint end = min((group.x + 1) * params.kept, params.tokens);
  for (uint at = group.x * params.kept + simdgroup * TQ_SIMD_ROWS; at < end; at += simdgroups * TQ_SIMD_ROWS) {
    const uint token = at + lane / TQ_ROW_LANES;
    const bool is_there = token < end;
    const int position = int(params.position + (is_there ? token : at));
    TqRow row;
    tq_load(x + ulong(position - int(params.position)) * TQ_HEAD_DIM, lane, row);
    tq_rotate(lane, signs, row);
    tq_keep_row(position, is_there, first, tail, params, lane, row);
  }
}
