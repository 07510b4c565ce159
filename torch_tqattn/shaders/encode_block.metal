// Coding a block whose tokens all wait in the dense tail, and keeping the new token that comes with it, in one kernel:
// what a step of a decode loop does once a block is full. encode.metal does the same for any tokens, but each of its
// threadgroups reads the whole block for the mean. Here a simdgroup reads the row that it codes, and no other;
// threadgroups of a block are one cluster, and send each other what they have added up.
//
// Specialised by: what encode.metal is, TQ_PIECES (threadgroups of a block), TQ_BEST (whether the best codes are looked
// for). For head dims of which a simdgroup holds one row.
#include <metal_stdlib>
using namespace metal;

#define TQ_SPREAD_ROWS
#include "cluster.h"
#include "codes.h"
#include "encode.h"
#include "order.h"

// Whether one text codes K's rows and V's: fewer instructions to fetch.
#define TQ_SAME_SIDES (TQ_K_BITS == TQ_V_BITS && TQ_K_LOW == TQ_V_LOW && TQ_K_HIGH == TQ_V_HIGH)

#define TQ_SUM_FLOATS (TQ_HEAD_DIM + 4)  // of rows that have been added up, and how many they are, four times
#define TQ_SUM_QUADS (TQ_SUM_FLOATS / 4)

// Threadgroup memory.
struct TqBlockMemory {
  threadgroup ulong* box;  // knows when all sums are there
  threadgroup float* book;
  threadgroup float* mean;
  threadgroup float* sums;  // of each threadgroup's rows
  threadgroup float* rows;  // that the threadgroup has read
};

static inline TqBlockMemory tq_block_memory(threadgroup float* scratch) {
  TqBlockMemory memory;
  memory.box = reinterpret_cast<threadgroup ulong*>(scratch);
  memory.book = scratch + 4;
  memory.mean = memory.book + TQ_BOOK_FLOATS;
  memory.sums = memory.mean + TQ_HEAD_DIM;
  memory.rows = memory.sums + TQ_PIECES * TQ_SUM_FLOATS;
  return memory;
}

// A codebook where its numbers are found sooner than in the device's memory.
struct TqNearBook {
  threadgroup const float* numbers;
  float threshold(uint i) const { return numbers[i]; }
  float level(uint code) const { return numbers[TQ_BOOK_FLOATS / 2 + code]; }
};

// All threads of the threadgroup call it together; they may read the book after the next barrier.
template <uint bits>
static inline void tq_open_book(uint thread_index, threadgroup float* book) {
  const uint codes = bits == 16 ? 0 : 1u << (bits % 16);
  for (uint i = thread_index; i < codes; i += TQ_PIECE_THREADS) {
    book[i] = TqConstantBook<bits>().threshold(min(i, codes - 2));
    book[TQ_BOOK_FLOATS / 2 + i] = TqConstantBook<bits>().level(i);
  }
}

// Where a row of the block waits; the last one for those that it does not have.
static inline device const half* tq_row_of_block(uint row, thread const TqTarget& target,
                                                 constant TqEncodeParams& params) {
  uint at = params.first_row + min(row, params.block_size - 1);
  if (at >= params.tail_slots) at -= params.tail_slots;
  return target.tail + (params.sink_length + at) * TQ_HEAD_DIM;
}

// Whether what this lane has of a row is finite.
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

static inline void tq_add_four(float4 x, thread float4& sum) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}

// Four numbers of each row of a run, which begin at `first`.
static inline float4 tq_sum_of_run(threadgroup const float* first) {
  float4 sum = *reinterpret_cast<threadgroup const float4*>(first);
#pragma unroll
  for (uint i = 1; i < TQ_RUN; ++i) {
    tq_add_four(*reinterpret_cast<threadgroup const float4*>(first + i * TQ_SUM_FLOATS), sum);
  }
  return sum;
}

// Adds up what all threadgroups have read; leaves the mean, as it is stored, in each one's memory. All threads call it
// together, after a barrier.
static inline void tq_share_mean(uint piece, uint thread_index, thread const TqBlockMemory& memory) {
  if (thread_index < TQ_SUM_QUADS) {
    threadgroup const float* its = memory.rows + thread_index * 4;
    float4 sum = tq_sum_of_run(its);
    tq_add_four(tq_sum_of_run(its + TQ_RUN * TQ_SUM_FLOATS), sum);
    threadgroup float* there = memory.sums + piece * TQ_SUM_FLOATS + thread_index * 4;
#pragma unroll
    for (uint p = 0; p < TQ_PIECES; ++p) tq_send(there, memory.box, p, sum);
  }
  tq_wait_for_box(memory.box);
  if (thread_index < TQ_HEAD_DIM) {
    float number = 0.0f, counted = 0.0f;
#pragma unroll
    for (uint p = 0; p < TQ_PIECES; ++p) {
      number += memory.sums[p * TQ_SUM_FLOATS + thread_index];
      counted += memory.sums[p * TQ_SUM_FLOATS + TQ_HEAD_DIM];
    }
    memory.mean[thread_index] = float(half(tq_saturated(number / max(counted, 1.0f))));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Stores a row, less its mean, in its slot.
template <uint bits, uint low, uint high>
static inline void tq_code_row(thread const TqRow& row, uint slot, thread const TqTarget& target, uint encode,
                               uint lane, thread const TqNearBook& book) {
  if (bits == 16) {
    tq_store_half(reinterpret_cast<device half*>(target.codes) + slot * TQ_HEAD_DIM, lane, row);
    return;
  }
  TqCodes codes;
  const float norm = tq_quantise<bits>(row, lane, encode, book, codes);
  tq_store_codes<low, high>(target.codes + slot * TQ_ROW_BYTES(low, high), lane, codes);
  if (lane % TQ_GROUP_LANES == 0) {
    target.norms[slot * TQ_NORM_GROUPS + lane / TQ_GROUP_LANES] = tq_stored_norm(norm, target);
  }
}

// Threadgroup group.x of those of the block of head group.y (sequence * KV heads + KV head), side group.z. The last
// simdgroup of threadgroup params.keeper keeps the new token.
[[max_total_threads_per_threadgroup(TQ_PIECE_THREADS)]] kernel void tq_encode_block(
    device const TQ_INPUT* k [[buffer(0)]], device const TQ_INPUT* v [[buffer(1)]], device uchar* k_codes [[buffer(2)]],
    device float* k_norms [[buffer(3)]], device half* k_means [[buffer(4)]], device half* k_tail [[buffer(5)]],
    device uchar* v_codes [[buffer(6)]], device float* v_norms [[buffer(7)]], device half* v_means [[buffer(8)]],
    device half* v_tail [[buffer(9)]], device const int* starts [[buffer(10)]],
    constant TqEncodeParams& params [[buffer(11)]], threadgroup uint4* scratch [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const uint thread_index = simdgroup * TQ_SIMD_LANES + lane;
  const TqBlockMemory memory = tq_block_memory(reinterpret_cast<threadgroup float*>(scratch));
  tq_open_box(memory.box, thread_index == 0);
  const bool is_k = group.z == 0;
  const ulong head = group.y;
  const ulong bytes =
      is_k ? TQ_SLOT_BYTES(TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH) : TQ_SLOT_BYTES(TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH);
  TqTarget target;
  target.x = (is_k ? k : v) + head * params.tokens * TQ_HEAD_DIM;
  target.codes = (is_k ? k_codes : v_codes) + head * params.slots * bytes;
  target.norms = (is_k ? k_norms : v_norms) + head * params.slots * TQ_NORM_GROUPS;
  target.means = (is_k ? k_means : v_means) + head * params.mean_ring * TQ_HEAD_DIM;
  target.tail = (is_k ? k_tail : v_tail) + head * (params.sink_length + params.tail_slots) * TQ_HEAD_DIM;
  target.norm_factor = is_k ? params.k_norm_factor : params.v_norm_factor;
  target.signs = tq_signs(lane);
  if (is_k || TQ_SAME_SIDES) {
    tq_open_book<TQ_K_BITS>(thread_index, memory.book);
  } else {
    tq_open_book<TQ_V_BITS>(thread_index, memory.book);
  }
  const uint index = group.x * TQ_PIECE_ROWS + simdgroup;
  const bool codes_row = simdgroup < TQ_PIECE_ROWS, is_there = codes_row && index < params.block_size;
  const bool keeps = !codes_row && group.x == params.keeper;
  device const half* waiting = tq_row_of_block(index, target, params);
  if (codes_row) tq_fetch<true>(tq_bytes(waiting + lane * TQ_LANE_DIMS));
  tq_wait_for_boxes(memory.box, TQ_PIECES * TQ_SUM_FLOATS * 4, thread_index == 0);
  tq_wait_for_earlier_kernels();

  target.first = params.has_starts != 0 ? max(starts[group.y / params.num_kv_heads], 0) : 0;
  // Padding and sinks are stored as zeros.
  const bool is_kept = int(params.coded_begin + index) >= target.first + int(params.sink_length);
  TqRow row, mean;
  if (codes_row) {
    tq_load_kept(waiting, lane, row);
  } else if (keeps) {
    tq_load(target.x, lane, row);
  }
  const bool has_means = is_k ? TQ_K_MEANS : TQ_V_MEANS;
  if (has_means && codes_row) {
    TqRow counted = row;
    const bool counts = is_there && is_kept && !simd_any(!tq_has_finite_lane(row));
    if (!counts) tq_clear(counted);
    threadgroup float* mine = memory.rows + simdgroup * TQ_SUM_FLOATS;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) mine[lane * TQ_LANE_DIMS + i] = counted.x[i];
    if (lane < 4) mine[TQ_HEAD_DIM + lane] = counts ? 1.0f : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  tq_clear(mean);
  if (has_means) {
    tq_share_mean(group.x, thread_index, memory);
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) mean.x[i] = memory.mean[lane * TQ_LANE_DIMS + i];
  }
  if (keeps) {  // perhaps in the place of a row that has been read by now
    tq_rotate(lane, target.signs, row);
    tq_keep_row(int(params.position), true, target.first, target.tail, params, lane, row);
  }
  if (!is_there) return;
  if (has_means && index == 0) tq_store_half(target.means + params.first_mean * TQ_HEAD_DIM, lane, mean);
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = is_kept ? row.x[i] - mean.x[i] : 0.0f;
  TqNearBook book;
  book.numbers = memory.book;
  const uint slot = params.first_slot + index;
  const uint encode = TQ_BEST ? TQ_ENCODE_BEST : params.encode == TQ_ENCODE_PLAIN ? TQ_ENCODE_PLAIN : TQ_ENCODE_FAST;
  if (is_k || TQ_SAME_SIDES) {
    tq_code_row<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(row, slot, target, encode, lane, book);
  } else {
    tq_code_row<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(row, slot, target, encode, lane, book);
  }
}
