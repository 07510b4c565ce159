// Attention over a compressed cache as in attend.metal, for queries of 16 bits on a GPU with fast products of small
// matrices: decoded rows, normalised queries and weights are rounded to half precision, sums are float.
//
// A simdgroup takes 16 positions at a time (matrix.h says which lane has what):
//   logits [16 positions, 8 queries] += keys [16, head_dim] * queries [head_dim, 8];
//   out [head_dim, 8 queries] += values [head_dim, 16 positions] * weights [16, 8].
// Weights have their value's norm in them, and are kept relative to the largest with its norm so far, so that none
// leaves half precision.
//
// Where a cluster of threadgroups has all positions of its queries, it also does what reduce.metal does.
//
// Specialised as attend.metal, but TQ_QUERIES is 8 or 16; and by TQ_OUTPUT, TQ_WHOLE (whether the store, and blocks, if
// there are any, are cut into whole tiles) and TQ_STAGED (whether these are asked for ahead: there is memory for it).
#include <metal_stdlib>
using namespace metal;

#define TQ_SPREAD_ROWS
#include "cluster.h"
#include "finish.h"
#include "order.h"
#include "params.h"
#include "state.h"
#include "tile.h"
#include "visible.h"

#if TQ_HEAD_DIM % 64 != 0 || TQ_HEAD_DIM > 256
#error "attend_matrix.metal is for head dims 64, 128, 192 and 256"
#endif

#define TQ_STEPS (TQ_HEAD_DIM / 16)  // products for the logits of 8 queries, or for their output
#define TQ_HALVES (TQ_QUERIES / 8)
// Of a lane's share of a query in threadgroup memory, in pairs of numbers, and of a query: lanes read from different
// banks.
#define TQ_SHARE_STRIDE (TQ_HEAD_DIM / 8 + 4)
#define TQ_QUERY_STRIDE (TQ_SHARES * TQ_SHARE_STRIDE)
// Numbers of the tables of levels in threadgroup memory.
#define TQ_TABLES                                                                              \
  ((TQ_TABLE_ENTRIES(TQ_K_BITS) > TQ_TABLE_ENTRIES(TQ_V_BITS) ? TQ_TABLE_ENTRIES(TQ_K_BITS)    \
                                                              : TQ_TABLE_ENTRIES(TQ_V_BITS)) * \
   2 * TQ_SIMD_LANES)
// Of a query's sums in threadgroup memory, with the sum of its weights and the largest logit after them: lanes write to
// different banks.
#define TQ_SUMS_STRIDE (TQ_HEAD_DIM + 4)
// From one simdgroup's sums to the next. Where tiles are asked for ahead, they lie where its own tile was.
#define TQ_SUMS \
  (TQ_STAGED && TQ_STAGE_BYTES / 4 > TQ_QUERIES * TQ_SUMS_STRIDE ? TQ_STAGE_BYTES / 4 : TQ_QUERIES * TQ_SUMS_STRIDE)
#define TQ_THREADS TQ_MATRIX_THREADS(TQ_HEAD_DIM, TQ_QUERIES)
#define TQ_LOG2_E 1.44269504f
#define TQ_NO_BLOCK 0x20000000  // positions of the only block, if there are none
#define TQ_LEAST_NORM 1.0e-20f  // relative to which weights are kept: a value may be zero

#if TQ_STAGED && TQ_TABLES + TQ_QUERIES * TQ_QUERY_STRIDE < TQ_QUERIES * TQ_SUMS_STRIDE
#error "results do not fit where tables and queries were"
#endif

// What a lane has of the queries: of query tq_column(lane) of each half its numbers, rotated and divided by a power of
// 2; of queries 2 s and 2 s + 1, s = tq_share(lane), everything else.
struct TqQueries {
  uint q[TQ_HALVES][TQ_STEPS][2];  // right-hand matrices
  float factor[TQ_HALVES][2];      // what a logit is multiplied with
  int open_begin;                  // the positions at which nothing has to be looked at, if there are any
  int open_end;
};

// What has been gathered for queries 2 s and 2 s + 1 of each half, in units of 2^largest: the weights' sum, as far as
// this lane's positions go, and numbers 2 i and 2 i + 1 of the lane's column of the values' sum.
struct TqGathered {
  float largest[TQ_HALVES][2];
  float sum[TQ_HALVES][2];
  float out[TQ_HALVES][TQ_STEPS][4];
};

// The means of a head's blocks: a ring of rows, and which of them a walk begins with.
struct TqMeans {
  device const half* k;
  device const half* v;
  uint ring;
  uint first;
  int first_end;  // where that block ends
};

// How positions are shared out: in units. A tile of codes is one, and a dense one, of sinks or of the newest tokens, 2
// to the power of dense_shift.
struct TqWork {
  int begin;
  int sinks_end;
  int end;
  int sinks;       // units
  int first_tile;  // after the sinks
  int coded;       // tiles, and units
  uint dense_shift;
};

static inline int tq_dense_tiles(thread const TqWork& work, int units) {
  return (units + (1 << work.dense_shift) - 1) >> work.dense_shift;
}

static inline int tq_begin_of_unit(thread const TqWork& work, int unit) {
  if (unit < work.sinks) return min(work.begin + tq_dense_tiles(work, unit) * TQ_TILE, work.sinks_end);
  const int rest = unit - work.sinks;
  const int tile = work.first_tile + min(rest, work.coded) + tq_dense_tiles(work, max(rest - work.coded, 0));
  return clamp(tile * TQ_TILE, work.sinks_end, work.end);
}

// The token of a query row of a KV head: its rows are counted token by token, the heads of its group in each. What is
// left of the last tile of rows computes the last row again, and keeps it to itself.
static inline uint tq_token(constant TqAttendParams& params, uint row) {
  return params.q_len == 1 ? 0 : min(row, params.q_len * params.heads_per_kv - 1) / params.heads_per_kv;
}

// Which row of q and of the results it is.
static inline ulong tq_query(constant TqAttendParams& params, uint batch, uint kv_head, uint row) {
  const uint used = min(row, params.q_len * params.heads_per_kv - 1), token = tq_token(params, row);
  const uint head = kv_head * params.heads_per_kv + used - token * params.heads_per_kv;
  return (ulong(batch) * params.num_heads + head) * params.q_len + token;
}

static inline float tq_max_of_columns(float x) {
#pragma unroll
  for (uint step = TQ_SHARES; step < TQ_SIMD_LANES; step *= 2) x = max(x, simd_shuffle_xor(x, ushort(step)));
  return x;
}

static inline float tq_sum_of_columns(float x) {
#pragma unroll
  for (uint step = TQ_SHARES; step < TQ_SIMD_LANES; step *= 2) x += simd_shuffle_xor(x, ushort(step));
  return x;
}

// Where a sequence's first token is, and where its last one ends.
static inline int tq_first(constant TqAttendParams& params, device const int* starts, uint batch) {
  return params.has_starts != 0 ? max(starts[batch], 0) : 0;
}

static inline int tq_length(constant TqAttendParams& params, device const int* lengths, uint batch) {
  const int length = int(params.length);
  return params.has_lengths != 0 ? clamp(lengths[batch], 0, length) : length;
}

// What of the arguments and of its place in the grid a threadgroup needs to hide positions: found again where it is
// used, so that no registers hold it.
struct TqPlace {
  device const uchar* mask;
  device const int* starts;
  device const int* lengths;
  uint batch;
  uint first_row;
};

// What is not done to most tiles: the soft cap, and hiding positions from queries: sinks, which are elsewhere,
// positions from `end` on, and those that a query may not see.
template <bool is_coded>
static inline void tq_hide(thread const TqPlace& place, constant TqAttendParams& params, uint lane, int tile_begin,
                           int end, thread float (&logits)[TQ_HALVES][4]) {
  const int first = tq_first(params, place.starts, place.batch);
  const int length = tq_length(params, place.lengths, place.batch);
  const int begin = is_coded && TQ_TAIL ? first + int(params.sink_length) : tile_begin;
#pragma unroll
  for (uint j = 0; j < 2; ++j) {
    const int position = tile_begin + int(tq_column(lane) + 8 * j);
    const bool is_there = position >= begin && position < end;
#pragma unroll
    for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        const uint token = tq_token(params, place.first_row + 8 * h + 2 * tq_share(lane) + i);
        const TqVisible seen = tq_visible(params, place.batch, first, length, token);
        bool is_visible = is_there && position >= seen.begin && position < seen.end;
        if (is_visible && params.mask_batch != 0) {
          const ulong mask_row = ulong(seen.mask_row) * (params.length - params.start);
          is_visible = place.mask[mask_row + uint(position - int(params.start))] != 0;
        }
        thread float& logit = logits[h][2 * j + i];
        if (params.softcap > 0.0f) logit = params.softcap * TQ_LOG2_E * precise::tanh(logit);
        if (!is_visible) logit = -INFINITY;
      }
    }
  }
}

// Where positions are hidden, values that are no numbers are left out, as a weight of 0 times NaN would be NaN; and the
// sums of those queries that do see them become NaN here.
template <uint bits, uint low, uint high>
static inline void tq_leave_out(uint lane, thread const float (&logits)[TQ_HALVES][4], thread float (&v_norm)[2],
                                thread TqValuePiece<low, high> (&values)[4], thread TqGathered& gathered) {
  bool is_number[2];
  if (bits == 16) {
    const uint spoilt = tq_spoilt_values(lane, values);
#pragma unroll
    for (uint j = 0; j < 2; ++j) is_number[j] = (spoilt >> (tq_column(lane) + 8 * j) & 1u) == 0;
  } else {
#pragma unroll
    for (uint j = 0; j < 2; ++j) {
      is_number[j] = v_norm[j] - v_norm[j] == 0.0f;
      if (!is_number[j]) v_norm[j] = 0.0f;
    }
  }
  if (!simd_any(!is_number[0] || !is_number[1])) return;
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      float spoilt = 0.0f;
#pragma unroll
      for (uint j = 0; j < 2; ++j) {
        if (!is_number[j] && logits[h][2 * j + i] != -INFINITY) spoilt = 1.0f;
      }
      if (tq_max_of_columns(spoilt) == 0.0f) continue;
#pragma unroll
      for (uint step = 0; step < TQ_STEPS; ++step) {
        gathered.out[h][step][i] = NAN;
        gathered.out[h][step][2 + i] = NAN;
      }
    }
  }
}

// products += keys * queries, in two sums that need not wait for each other.
template <uint bits, uint low, uint high>
static inline void tq_add_products(thread const TqQueries& queries, thread const TqKeyPiece<low, high> (&keys)[2],
                                   threadgroup const uint* table, uint lane,
                                   thread float (&products)[TQ_HALVES][2][4]) {
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      products[h][0][i] = 0.0f;
      products[h][1][i] = 0.0f;
    }
  }
#pragma unroll
  for (uint eight = 0; eight < TQ_STEPS / 2; ++eight) {
    uint first[4], second[4];
    tq_pairs<bits>(keys[0], eight, table, lane, first);
    tq_pairs<bits>(keys[1], eight, table, lane, second);
#pragma unroll
    for (uint j = 0; j < 2; ++j) {
      const uint left[4] = {first[2 * j], second[2 * j], first[2 * j + 1], second[2 * j + 1]};
#pragma unroll
      for (uint h = 0; h < TQ_HALVES; ++h) tq_multiply(lane, left, queries.q[h][2 * eight + j], products[h][j]);
    }
  }
}

// The left matrices of values from number 8 * eight on, for four steps.
template <uint bits, uint low, uint high>
static inline void tq_left_of_values(thread const TqValuePiece<low, high> (&values)[4], uint eight,
                                     threadgroup const uint* table, uint lane, thread uint (&left)[4][4]) {
#pragma unroll
  for (uint i = 0; i < 2; ++i) {
    uint even[4], odd[4];
    tq_across<bits>(values[2 * i], values[2 * i + 1], eight, table, lane, even, odd);
#pragma unroll
    for (uint j = 0; j < 4; ++j) {
      left[j][2 * i] = even[j];
      left[j][2 * i + 1] = odd[j];
    }
  }
}

// The logits of a mean, which stands in all rows of the left matrices.
static inline void tq_add_mean_logits(thread const TqQueries& queries, device const half* mean, uint lane,
                                      thread float (&mean_logit)[TQ_HALVES][2]) {
  TqKeyPiece<16, 0> piece;
  tq_read_piece(tq_far(mean), 0, 0, tq_share(lane), TQ_SHARES, piece);
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
    float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (uint step = 0; step < TQ_STEPS; ++step) {
      const uint first = piece.low_words[2 * step], second = piece.low_words[2 * step + 1];
      const uint left[4] = {first, first, second, second};
      tq_multiply(lane, left, queries.q[h][step], product);
    }
#pragma unroll
    for (uint i = 0; i < 2; ++i) mean_logit[h][i] = product[i] * queries.factor[h][i];
  }
}

// Adds a block's mean as often as its positions have weight.
static inline void tq_add_mean(device const half* mean, uint lane, thread float (&block_weight)[TQ_HALVES][2],
                               thread TqGathered& gathered) {
  TqValuePiece<16, 0> piece;
  tq_read_piece(tq_far(mean), 0, 0, tq_column(lane), TQ_COLUMNS, piece);
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
    float weight[2];
#pragma unroll
    for (uint i = 0; i < 2; ++i) weight[i] = tq_sum_of_columns(block_weight[h][i]);
#pragma unroll
    for (uint step = 0; step < TQ_STEPS; ++step) {
#pragma unroll
      for (uint i = 0; i < 4; ++i) {
        const float number = tq_unpack(piece.low_words[step], i / 2);
        gathered.out[h][step][i] = fma(weight[i % 2], number, gathered.out[h][step][i]);
      }
    }
  }
}

// Adds the positions from `tile` on, up to `end`.
template <bool is_coded, uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high, bool is_whole>
static inline void tq_walk(thread const TqQueries& queries, thread const TqRows<k_bits, k_low, k_high, is_whole>& k,
                           thread const TqRows<v_bits, v_low, v_high, is_whole>& v, thread const TqMeans& means,
                           thread const TqPlace& place, threadgroup const uint* tables, constant TqAttendParams& params,
                           uint lane, int end, int block_size, TqTile tile, thread TqStage& stage,
                           thread TqGathered& gathered) {
  const bool has_k_means = is_coded && TQ_K_MEANS;
  const bool has_v_means = is_coded && TQ_V_MEANS;
  const float k_factor = k_bits != 16 ? tq_level_scale<k_bits>() * params.k_norm_factor : 1.0f;
  const float v_factor = v_bits != 16 ? tq_level_scale<v_bits>() * params.v_norm_factor : 1.0f;
  threadgroup const uint* v_table = tables + (k_bits == v_bits ? 0 : TQ_SIMD_LANES);
  const int open_end = min(queries.open_end, end);
  uint mean = means.first;
  int block_end = min(end, means.first_end);
  while (tile.begin < end) {
    // A key's logit is that of its code and that of its block's mean.
    float mean_logit[TQ_HALVES][2], block_weight[TQ_HALVES][2];
#pragma unroll
    for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        mean_logit[h][i] = 0.0f;
        block_weight[h][i] = 0.0f;
      }
    }
    if (has_k_means) tq_add_mean_logits(queries, means.k + mean * TQ_HEAD_DIM, lane, mean_logit);
    const uint next_mean = mean + 1 == means.ring ? 0 : mean + 1;
    if (has_k_means) tq_fetch_mean(means.k + next_mean * TQ_HEAD_DIM, lane);
    if (has_v_means) tq_fetch_mean(means.v + next_mean * TQ_HEAD_DIM, lane);
    while (tile.begin < block_end) {
      const int next_end = tile.end == block_end ? min(end, block_end + block_size) : block_end;
      const TqTile next = tq_tile<is_whole>(tile.end, next_end, tile.row + uint(tile.end - tile.begin), k.ring);
      if (is_whole && TQ_STAGED) tq_wait_for_bytes();
      float products[TQ_HALVES][2][4], k_norm[2], v_norm[2];
      TqKeyPiece<k_low, k_high> keys[2];
      TqValuePiece<v_low, v_high> values[4];
      tq_read_keys(k, tile, stage, lane, keys);
      tq_read_norms(k, tile, stage, TQ_STAGED_K_NORMS, lane, k_norm);
      tq_read_norms(v, tile, stage, TQ_STAGED_V_NORMS, lane, v_norm);
      if (TQ_IS_STAGED(v_bits, is_whole)) tq_read_values(v, tile, stage, lane, values);
      if (is_whole && TQ_STAGED) {
        simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes have read it
        tq_ask_for_tile(k, v, end, lane, stage);
      }
      tq_add_products<k_bits>(queries, keys, tables, lane, products);
      const bool is_open =
          tile.begin + TQ_TILE == tile.end && tile.begin >= queries.open_begin && tile.begin + TQ_TILE <= open_end;
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        k_norm[i] *= k_factor;
        v_norm[i] *= v_factor;
      }
      float logits[TQ_HALVES][4];
#pragma unroll
      for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
          const float product = products[h][0][i] + products[h][1][i];
          logits[h][i] = fma(product, k_norm[i / 2] * queries.factor[h][i % 2], mean_logit[h][i % 2]);
        }
      }
      if (!TQ_IS_STAGED(v_bits, is_whole)) tq_read_values(v, tile, stage, lane, values);
      if (!is_open) {
        tq_hide<is_coded>(place, params, lane, tile.begin, min(tile.end, end), logits);
        tq_leave_out<v_bits>(lane, logits, v_norm, values, gathered);
      }

      float v_size[2];
#pragma unroll
      for (uint i = 0; i < 2; ++i) v_size[i] = v_bits != 16 ? fast::log2(max(v_norm[i], TQ_LEAST_NORM)) : 0.0f;
      uint weights[TQ_HALVES][2];
#pragma unroll
      for (uint h = 0; h < TQ_HALVES; ++h) {
        float largest[2];
#pragma unroll
        for (uint i = 0; i < 2; ++i) largest[i] = max(logits[h][i] + v_size[0], logits[h][2 + i] + v_size[1]);
        if (simd_any(largest[0] > gathered.largest[h][0] || largest[1] > gathered.largest[h][1])) {
          float decay[2];
#pragma unroll
          for (uint i = 0; i < 2; ++i) {
            largest[i] = max(tq_max_of_columns(largest[i]), gathered.largest[h][i]);
            decay[i] = fast::exp2(gathered.largest[h][i] - largest[i]);
            gathered.largest[h][i] = largest[i];
            gathered.sum[h][i] *= decay[i];
            block_weight[h][i] *= decay[i];
          }
#pragma unroll
          for (uint step = 0; step < TQ_STEPS; ++step) {
#pragma unroll
            for (uint i = 0; i < 4; ++i) gathered.out[h][step][i] *= decay[i % 2];
          }
        }
        float shares[4];
#pragma unroll
        for (uint i = 0; i < 4; ++i) shares[i] = fast::exp2(logits[h][i] - gathered.largest[h][i % 2]);
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
          block_weight[h][i] += shares[i] + shares[2 + i];
          weights[h][i] = tq_transpose(lane, tq_pack(shares[2 * i] * v_norm[i], shares[2 * i + 1] * v_norm[i]));
        }
      }

#pragma unroll
      for (uint eight = 0; eight < TQ_STEPS / 4; ++eight) {
        uint left[4][4];
        tq_left_of_values<v_bits>(values, eight, v_table, lane, left);
#pragma unroll
        for (uint j = 0; j < 4; ++j) {
#pragma unroll
          for (uint h = 0; h < TQ_HALVES; ++h) {
            tq_multiply(lane, left[j], weights[h], gathered.out[h][4 * eight + j]);
          }
        }
      }
      tile = next;
    }
#pragma unroll
    for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
      for (uint i = 0; i < 2; ++i) gathered.sum[h][i] += block_weight[h][i];
    }
    if (has_v_means) tq_add_mean(means.v + mean * TQ_HEAD_DIM, lane, block_weight, gathered);
    mean = next_mean;
    block_end = min(end, block_end + block_size);
  }
}

// Threads as in attend.metal.
//
// memory: the tables of K's and V's levels, TQ_QUERIES rows of queries, and for each simdgroup TQ_SUMS numbers: a tile
// that is asked for ahead, then its sums. Where no tile is, sums lie where tables and queries were. Then TQ_QUERIES
// rows of results, there too or after such sums.
[[max_total_threads_per_threadgroup(TQ_THREADS)]] kernel void tq_attend_matrix(
    device const TQ_INPUT* q [[buffer(0)]], device const uchar* k_codes [[buffer(1)]],
    device const float* k_norms [[buffer(2)]], device const half* k_means [[buffer(3)]],
    device const half* k_tail [[buffer(4)]], device const uchar* v_codes [[buffer(5)]],
    device const float* v_norms [[buffer(6)]], device const half* v_means [[buffer(7)]],
    device const half* v_tail [[buffer(8)]], device const uchar* mask [[buffer(9)]],
    device const int* starts [[buffer(10)]], device const int* lengths [[buffer(11)]],
    device float* partials [[buffer(12)]], constant TqAttendParams& params [[buffer(13)]],
    device const float* sinks [[buffer(14)]], device TQ_OUTPUT* out [[buffer(15)]], device float* lse [[buffer(16)]],
    constant TqFinishParams& finish [[buffer(17)]], threadgroup uint* memory [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  // What comes before the queries are read takes nothing from other kernels, and need not wait for them.
  const float k_level = tq_level_for_table<(TQ_K_BITS)>(lane, 4 * simdgroup, simdgroups);
  const float v_level = tq_level_for_table<(TQ_V_BITS)>(lane, 4 * simdgroup, simdgroups);
  const uint signs = tq_signs(lane);
  if (params.has_starts != 0 || params.has_lengths != 0) tq_wait_for_earlier_kernels();
  const uint heads_per_kv = params.heads_per_kv, rows = params.q_len * heads_per_kv;
  const uint batch = group.z, kv_head = params.query_tiles > 1 ? group.y / params.query_tiles : group.y;
  const uint first_row = (group.y - kv_head * params.query_tiles) * TQ_QUERIES;
  const uint used_rows = min(rows - first_row, uint(TQ_QUERIES));
  TqPlace place;
  place.mask = mask;
  place.starts = starts;
  place.lengths = lengths;
  place.batch = batch;
  place.first_row = first_row;
  const int first = tq_first(params, starts, batch), length = tq_length(params, lengths, batch);

  // The positions that the first and the last query may see: no query sees what is before those of the first, or after
  // those of the last.
  const TqVisible oldest = tq_visible(params, batch, first, length, tq_token(params, first_row));
  const TqVisible newest = tq_visible(params, batch, first, length, tq_token(params, first_row + used_rows - 1));
  const int begin = oldest.begin, end = max(begin, newest.end);
  // This simdgroup's share: whole tiles, which but for those of sinks begin at multiples of their size.
  TqWork work;
  work.begin = begin;
  work.sinks_end = TQ_TAIL ? clamp(first + int(params.sink_length), begin, end) : begin;
  work.end = end;
  work.dense_shift = params.dense_shift;
  work.sinks = (work.sinks_end - begin + TQ_TILE - 1) / TQ_TILE << work.dense_shift;
  work.first_tile = work.sinks_end / TQ_TILE;
  const int tiles = (end + TQ_TILE - 1) / TQ_TILE - work.first_tile;
  work.coded = TQ_TAIL ? clamp(int(params.coded) / TQ_TILE - work.first_tile, 0, tiles) : tiles;
  // Every so often one has a unit more, so that no threadgroup has much more than others. Divisions take too long. A
  // part has to begin where the one before ends: rounding is not left to the compiler.
  const int units = work.sinks + work.coded + ((tiles - work.coded) << work.dense_shift);
  const int part = int(group.x * simdgroups + simdgroup);
  const float share = float(units) * params.part;
  const bool is_last = part + 1 == int(params.splits * simdgroups);
  const int from = tq_begin_of_unit(work, int(fma(float(part), share, 0.5f)));
  const int to = tq_begin_of_unit(work, is_last ? units : int(fma(float(part + 1), share, 0.5f)));
  // The first tokens, what has been coded, and the newest tokens.
  const int coded_begin = TQ_TAIL ? clamp(first + int(params.sink_length), from, to) : from;
  const int coded_end = TQ_TAIL ? clamp(int(params.coded), coded_begin, to) : to;

  const ulong store = ulong(batch) * params.num_kv_heads + kv_head;
  const uint tail_rows = params.sink_length + params.tail_slots;
  const TqStore k = tq_store_of_head<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(k_codes, k_norms, k_means, k_tail, store,
                                                                     params.slots, params.mean_ring, tail_rows);
  const TqStore v = tq_store_of_head<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(v_codes, v_norms, v_means, v_tail, store,
                                                                     params.slots, params.mean_ring, tail_rows);
  const bool has_means = TQ_K_MEANS || TQ_V_MEANS;
  const int block_size = has_means ? int(params.block_size) : TQ_NO_BLOCK;
  TqRows<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_WHOLE> k_rows;
  TqRows<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH, TQ_WHOLE> v_rows;
  TqMeans means;
  k_rows.rows = k.codes;
  v_rows.rows = v.codes;
  k_rows.norms = k.norms;
  v_rows.norms = v.norms;
  k_rows.ring = v_rows.ring = params.slots;
  means.k = k.means;
  means.v = v.means;
  means.ring = params.mean_ring;
  means.first = 0;
  means.first_end = TQ_NO_BLOCK;
  TqTile tile;
  if (coded_begin < coded_end) {
    uint slot = params.first_slot + uint(coded_begin - int(params.start));
    if (slot >= params.slots) slot %= params.slots;
    const uint before = TQ_WHOLE ? slot % TQ_TILE : 0;  // in the first tile
    if (has_means) means.first = params.block_shift != 0 ? slot >> params.block_shift : slot / uint(block_size);
    means.first_end = coded_begin - int(slot - means.first * uint(block_size)) + block_size;
    tile = tq_tile<TQ_WHOLE>(coded_begin - int(before), min(coded_end, means.first_end), slot - before, params.slots);
  }
  const uint first_query = simdgroup * TQ_SIMD_ROWS;
  uint query = first_query + lane / TQ_ROW_LANES;
  device const TQ_INPUT* query_row = q + tq_query(params, batch, kv_head, first_row + query) * TQ_HEAD_DIM;
  // Memory has little to do while the call before merges its parts in a kernel of its own.
  if (TQ_WHOLE && finish.is_finished == 0) {
    if (first_query < used_rows && tq_is_used(lane)) {
      tq_fetch<true>(tq_bytes(query_row + tq_place(lane) * TQ_LANE_DIMS));
    }
    if (coded_begin < coded_end) {
      tq_fetch_tile<true>(k_rows, tile, lane);
      tq_fetch_tile<true>(v_rows, tile, lane);
    }
  }
  if (TQ_K_BITS != 16) tq_make_table<(TQ_K_BITS)>(lane, simdgroup, simdgroups, k_level, memory);
  if (TQ_V_BITS != 16 && TQ_V_BITS != TQ_K_BITS) {
    tq_make_table<(TQ_V_BITS)>(lane, simdgroup, simdgroups, v_level, memory + TQ_SIMD_LANES);
  }
  threadgroup uint* query_rows = memory + TQ_TABLES;
  threadgroup float* query_units = reinterpret_cast<threadgroup float*>(query_rows + TQ_QUERIES * TQ_QUERY_STRIDE);
  threadgroup float* sums = TQ_STAGED ? query_units + TQ_QUERIES : reinterpret_cast<threadgroup float*>(memory);
  threadgroup float* own_sums = sums + simdgroup * TQ_SUMS;
  TqStage stage = tq_stage(k_rows, v_rows, reinterpret_cast<threadgroup uchar*>(own_sums), lane);
  tq_wait_for_earlier_kernels();

  // Queries come first, because all of the threadgroup waits for them; then what comes before anything else.
  uint words[TQ_LANE_DIMS / 2];
  if (first_query < used_rows) tq_load_words(query_row, lane, words);
  if (coded_begin < coded_end) {
    if (TQ_K_MEANS) tq_fetch_mean(means.k + means.first * TQ_HEAD_DIM, lane);
    if (TQ_V_MEANS) tq_fetch_mean(means.v + means.first * TQ_HEAD_DIM, lane);
    if (!TQ_IS_STAGED(TQ_K_BITS, TQ_WHOLE)) tq_fetch_tile<false>(k_rows, tile, lane);
    if (!TQ_IS_STAGED(TQ_V_BITS, TQ_WHOLE)) tq_fetch_tile<false>(v_rows, tile, lane);
    stage.next = tile.begin;
    stage.row = tile.row;
    if (TQ_STAGED) tq_ask_for_tile(k_rows, v_rows, coded_end, lane, stage);
  }

  if (TQ_TAIL) {
    if (from < coded_begin) {
      tq_fetch_rows<2 * TQ_HEAD_DIM, false>(tq_bytes(k.tail), uint(from - first) * (2 * TQ_HEAD_DIM), lane);
      tq_fetch_rows<2 * TQ_HEAD_DIM, false>(tq_bytes(v.tail), uint(from - first) * (2 * TQ_HEAD_DIM), lane);
    }
    if (coded_end < to) {
      const uint row = params.sink_length + uint(coded_end) % params.tail_slots;
      tq_fetch_rows<2 * TQ_HEAD_DIM, false>(tq_bytes(k.tail), row * (2 * TQ_HEAD_DIM), lane);
      tq_fetch_rows<2 * TQ_HEAD_DIM, false>(tq_bytes(v.tail), row * (2 * TQ_HEAD_DIM), lane);
    }
  }

#pragma unroll 1
  for (uint r = first_query; r < used_rows; r += simdgroups * TQ_SIMD_ROWS) {
    TqRow numbers;
    tq_numbers_of_words(TQ_INPUT(), lane, words, numbers);
    if (params.rotate_q != 0) tq_rotate(lane, signs, numbers);
    float peak = 0.0f;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) peak = max(peak, abs(numbers.x[i]));
    // A power of 2, so that nothing is rounded but to half precision.
    const float unit = tq_power_of_two(tq_max(peak, TQ_ROW_LANES));
    const float inverse = 1.0f / unit;
    if (query < TQ_QUERIES && tq_is_used(lane)) {
      const uint dim = tq_place(lane) * TQ_LANE_DIMS, chunk = dim / TQ_K_CHUNK;
      threadgroup uint* to = query_rows + query * TQ_QUERY_STRIDE + chunk % TQ_SHARES * TQ_SHARE_STRIDE +
                             (chunk / TQ_SHARES * TQ_K_CHUNK + dim % TQ_K_CHUNK) / 2;
#pragma unroll
      for (uint i = 0; i < TQ_LANE_DIMS / 2; ++i) {
        to[i] = tq_pack(numbers.x[2 * i] * inverse, numbers.x[2 * i + 1] * inverse);
      }
      if (tq_place(lane) == 0) query_units[query] = unit;
    }
    query += simdgroups * TQ_SIMD_ROWS;
    if (r + simdgroups * TQ_SIMD_ROWS < used_rows) {
      tq_load_words(q + tq_query(params, batch, kv_head, first_row + query) * TQ_HEAD_DIM, lane, words);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  TqQueries queries;
  TqGathered gathered;
  const bool is_closed = params.mask_batch != 0 || params.softcap > 0.0f;
  queries.open_begin = TQ_TAIL ? max(newest.begin, first + int(params.sink_length)) : newest.begin;
  queries.open_end = is_closed ? 0 : oldest.end;
  // Logits are in powers of 2; under a soft cap first in units of it.
  const float scale = params.scale * (params.softcap > 0.0f ? 1.0f / params.softcap : TQ_LOG2_E);
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      gathered.largest[h][i] = TQ_NO_LOGIT;
      gathered.sum[h][i] = 0.0f;
    }
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      queries.factor[h][i] = query_units[min(8 * h + 2 * tq_share(lane) + i, used_rows - 1)] * scale;
    }
    const uint row = min(8 * h + tq_column(lane), used_rows - 1);  // what is not used is the last row again
    threadgroup const uint4* four = reinterpret_cast<threadgroup const uint4*>(query_rows + row * TQ_QUERY_STRIDE +
                                                                               tq_share(lane) * TQ_SHARE_STRIDE);
#pragma unroll
    for (uint step = 0; step < TQ_STEPS; step += 2) {
      const uint4 pairs = four[step / 2];
      queries.q[h][step][0] = pairs.x;
      queries.q[h][step][1] = pairs.y;
      queries.q[h][step + 1][0] = pairs.z;
      queries.q[h][step + 1][1] = pairs.w;
    }
#pragma unroll
    for (uint step = 0; step < TQ_STEPS; ++step) {
#pragma unroll
      for (uint i = 0; i < 4; ++i) gathered.out[h][step][i] = 0.0f;
    }
  }

  if (coded_begin < coded_end) {
    tq_walk<true>(queries, k_rows, v_rows, means, place, memory, params, lane, coded_end, block_size, tile, stage,
                  gathered);
  }
  if (TQ_TAIL) {
#pragma unroll 1
    for (uint i = 0; i < 2; ++i) {
      const int dense_begin = i == 0 ? from : coded_end, dense_end = i == 0 ? coded_begin : to;
      if (dense_begin >= dense_end) continue;
      const uint ring = i == 0 ? params.sink_length : params.tail_slots;
      const uint row = i == 0 ? uint(from - first) : uint(coded_end) % params.tail_slots;
      const uint offset = i == 0 ? 0 : params.sink_length * TQ_HEAD_DIM;
      TqDenseRows k_dense, v_dense;
      k_dense.rows = tq_bytes(k.tail + offset);
      v_dense.rows = tq_bytes(v.tail + offset);
      k_dense.ring = v_dense.ring = ring;
      means.first_end = TQ_NO_BLOCK;
      tq_walk<false>(queries, k_dense, v_dense, means, place, memory, params, lane, dense_end, TQ_NO_BLOCK,
                     tq_tile<false>(dense_begin, dense_end, row, ring), stage, gathered);
    }
  }

  if (!TQ_STAGED) threadgroup_barrier(mem_flags::mem_threadgroup);  // sums lie where tables and queries were
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      const float sum = tq_sum_of_columns(gathered.sum[h][i]);
      const uint row = 8 * h + 2 * tq_share(lane) + i;
      if (row >= used_rows) continue;
      threadgroup float* its_sums = own_sums + row * TQ_SUMS_STRIDE;
      if (tq_column(lane) == 0) {
        its_sums[TQ_HEAD_DIM] = sum;
        its_sums[TQ_HEAD_DIM + 1] = gathered.largest[h][i];
      }
#pragma unroll
      for (uint n = 0; n < 2 * TQ_STEPS; ++n) {
        its_sums[n * TQ_COLUMNS + tq_column(lane)] = gathered.out[h][n / 2][n % 2 * 2 + i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // No register holds them meanwhile, and after the cluster was waited for the first cache is empty: with the shuffle
  // they are read here.
  const uint result_signs = simd_shuffle(tq_signs(lane), ushort(lane));

  // A simdgroup merges a row; lane s has the factor of simdgroup s.
  threadgroup float* merged = reinterpret_cast<threadgroup float*>(memory) + (TQ_STAGED ? 0 : simdgroups * TQ_SUMS);
  const ulong all_rows = ulong(params.batch) * params.num_heads * params.q_len;
  for (uint row = simdgroup; row < used_rows; row += simdgroups) {
    threadgroup const float* its_sums = sums + row * TQ_SUMS_STRIDE;
    threadgroup const float* its = its_sums + min(lane, simdgroups - 1) * TQ_SUMS + TQ_HEAD_DIM;
    float largest = its[1];
#pragma unroll
    for (uint step = 1; step < TQ_THREADS / TQ_SIMD_LANES; step *= 2) {
      largest = max(largest, simd_shuffle_xor(largest, ushort(step)));
    }
    const float factor = lane < simdgroups ? fast::exp2(its[1] - largest) : 0.0f;
    float sum = its[0] * factor, numbers[TQ_HEAD_DIM / TQ_SIMD_LANES];
#pragma unroll
    for (uint step = 1; step < TQ_THREADS / TQ_SIMD_LANES; step *= 2) sum += simd_shuffle_xor(sum, ushort(step));
#pragma unroll
    for (uint i = 0; i < TQ_HEAD_DIM / TQ_SIMD_LANES; ++i) numbers[i] = 0.0f;
#pragma unroll 8
    for (uint s = 0; s < simdgroups; ++s) {
      const float its_factor = simd_shuffle(factor, ushort(s));
#pragma unroll
      for (uint i = 0; i < TQ_HEAD_DIM / TQ_SIMD_LANES; ++i) {
        numbers[i] = fma(its_sums[s * TQ_SUMS + i * TQ_SIMD_LANES + lane], its_factor, numbers[i]);
      }
    }
    largest *= 1.0f / TQ_LOG2_E;
    const ulong at = (store * rows + first_row + row) * params.splits + group.x;
#pragma unroll
    for (uint i = 0; i < TQ_HEAD_DIM / TQ_SIMD_LANES; ++i) {
      const uint place = i * TQ_SIMD_LANES + lane, dim = tq_value_dim(place % TQ_COLUMNS, place / TQ_COLUMNS);
      if (finish.is_finished != 0) {
        merged[row * TQ_SUMS_STRIDE + dim] = numbers[i];
      } else {  // as attend.metal leaves them
        partials[at * TQ_HEAD_DIM + dim] = numbers[i];
      }
    }
    if (lane == 0 && finish.is_finished != 0) {
      merged[row * TQ_SUMS_STRIDE + TQ_HEAD_DIM] = sum;
      merged[row * TQ_SUMS_STRIDE + TQ_HEAD_DIM + 1] = largest;
    } else if (lane == 0) {
      device float* scale = partials + all_rows * params.splits * TQ_HEAD_DIM + at * 2;
      scale[0] = sum;
      scale[1] = largest;
    }
  }
  if (finish.is_finished == 0) return;
  tq_wait_for_cluster();

  // There are no other parts. The cluster's threadgroups share the rows.
  for (uint row = group.x + params.splits * simdgroup; row < used_rows; row += params.splits * simdgroups) {
    threadgroup const float* its = merged + row * TQ_SUMS_STRIDE;
    const float2 scale = tq_read_of_cluster(its + TQ_HEAD_DIM, min(lane, params.splits - 1));
    TqRow parts_of_row[TQ_MOST_OF_CLUSTER];
#pragma unroll
    for (uint n = 0; n < TQ_MOST_OF_CLUSTER; ++n) {
      tq_load_of_cluster(its, min(n, params.splits - 1), lane, parts_of_row[n]);
    }
    TqState state;
    tq_start(state);
    state.largest = scale.y;
#pragma unroll
    for (uint step = 1; step < TQ_MOST_OF_CLUSTER; step *= 2) {
      state.largest = max(state.largest, simd_shuffle_xor(state.largest, ushort(step)));
    }
    const float factor = lane < params.splits ? tq_decay(scale.y, state.largest) : 0.0f;
#pragma unroll
    for (uint n = 0; n < TQ_MOST_OF_CLUSTER; ++n) {
      const float its_factor = simd_shuffle(factor, ushort(n));
      state.sum = fma(its_factor, simd_shuffle(scale.x, ushort(n)), state.sum);
      if (n < params.splits) tq_add(its_factor, parts_of_row[n], state.out);
    }
    state.largest = simd_shuffle(state.largest, ushort(0));
    const ulong to = tq_query(params, batch, kv_head, first_row + row);
    if (finish.has_sinks != 0) tq_add_sink(sinks[to / params.q_len % params.num_heads], state);
    tq_finish(state, finish, lane, result_signs, lane < TQ_ROW_LANES, to, out, lse);
  }
  if (params.splits > 1) tq_leave_cluster();
}
