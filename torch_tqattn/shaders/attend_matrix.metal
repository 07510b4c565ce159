// Attention over a compressed cache as in attend.metal, for queries of 16 bits on a GPU with fast products of small
// matrices: decoded rows, normalised queries and weights are rounded to half precision, sums are float.
//
// A simdgroup takes 16 positions at a time (matrix.h says which lane has what):
//   logits [16 positions, 8 queries] += keys [16, head_dim] * queries [head_dim, 8];
//   out [head_dim, 8 queries] += values [head_dim, 16 positions] * weights [16, 8].
// Weights have their value's norm in them, and are kept relative to the largest with its norm so far, so that none
// leaves half precision.
//
// Specialised as attend.metal, but TQ_QUERIES is 8 or 16.
#include <metal_stdlib>
using namespace metal;

#include "params.h"
#include "state.h"
#include "tile.h"
#include "visible.h"

#if TQ_HEAD_DIM % 64 != 0 || TQ_HEAD_DIM > 256
#error "attend_matrix.metal is for head dims 64, 128, 192 and 256"
#endif

#define TQ_STEPS (TQ_HEAD_DIM / 16)  // products for the logits of 8 queries, or for their output
#define TQ_HALVES (TQ_QUERIES / 8)
// Of a lane's share of a query in threadgroup memory, so that lanes read from different banks; and of a query, with the
// largest of its numbers.
#define TQ_SHARE_STRIDE (TQ_HEAD_DIM / 4 + 4)
#define TQ_QUERY_STRIDE (TQ_HEAD_DIM + 16)
#define TQ_SUMS_STRIDE (TQ_HEAD_DIM + 4)  // of a query's sums in threadgroup memory: lanes write to different banks
#define TQ_THREADS TQ_MATRIX_THREADS(TQ_HEAD_DIM, TQ_QUERIES)
#define TQ_LOG2_E 1.44269504f
#define TQ_LEAST_NORM 1.0e-20f  // relative to which weights are kept: a value may be zero

// What a lane has of the queries: of query tq_column(lane) of each half its numbers, rotated and divided by a power of
// 2; of queries 2 s and 2 s + 1, s = tq_share(lane), everything else.
struct TqQueries {
  uint q[TQ_HALVES][TQ_STEPS][2];  // right-hand matrices
  float factor[TQ_HALVES][2];      // what a logit is multiplied with
  int begin[TQ_HALVES][2];         // the positions that each may see
  int end[TQ_HALVES][2];
  uint mask_row[TQ_HALVES][2];
  int all_begin;  // the positions that all may see, if there is no mask
  int all_end;
};

// What has been gathered for queries 2 s and 2 s + 1 of each half, in units of 2^largest: the weights' sum, as far as
// this lane's positions go, and numbers 2 i and 2 i + 1 of the lane's column of the values' sum.
struct TqGathered {
  float largest[TQ_HALVES][2];
  float sum[TQ_HALVES][2];
  float out[TQ_HALVES][TQ_STEPS][4];
};

// For two queries of the lane's share, what the lanes of their columns have.
static inline void tq_across_columns(uint lane, float x, thread float (&pair)[2]) {
#pragma unroll
  for (uint i = 0; i < 2; ++i) pair[i] = simd_shuffle(x, ushort((2 * tq_share(lane) + i) * TQ_SHARES));
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

// What hides single positions of a tile from single queries.
static inline void tq_hide(thread const TqQueries& queries, device const uchar* mask, constant TqAttendParams& params,
                           uint lane, thread const TqTile& tile, uint h, thread float (&logits)[4]) {
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const int position = tile.begin + int(tq_column(lane) + i / 2 * 8);
    bool is_visible = position < tile.end && position >= queries.begin[h][i % 2] && position < queries.end[h][i % 2];
    if (is_visible && params.mask_batch != 0) {
      const ulong row = ulong(queries.mask_row[h][i % 2]) * (params.length - params.start);
      is_visible = mask[row + uint(position - int(params.start))] != 0;
    }
    if (!is_visible) logits[i] = -INFINITY;
  }
}

// Adds the positions from the tile that was read on, up to `end`.
template <bool is_coded, uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high>
static inline void tq_walk(thread const TqQueries& queries, thread const TqRows<k_bits, k_low, k_high>& k,
                           thread const TqRows<v_bits, v_low, v_high>& v, device const half* k_means,
                           device const half* v_means, device const uchar* mask, threadgroup const uint* tables,
                           constant TqAttendParams& params, uint lane, int end, int block_size,
                           thread TqAhead<k_bits, k_low, k_high, v_bits, v_low, v_high>& now,
                           thread TqGathered& gathered) {
  const bool has_k_means = is_coded && TQ_K_MEANS;
  const bool has_v_means = is_coded && TQ_V_MEANS;
  const float k_factor = k_bits != 16 ? tq_level_scale<k_bits>() * params.k_norm_factor : 1.0f;
  const float v_factor = v_bits != 16 ? tq_level_scale<v_bits>() * params.v_norm_factor : 1.0f;
  threadgroup const uint* v_table = tables + (k_bits == v_bits ? 0 : TQ_SIMD_LANES);
  float mean_logit[TQ_HALVES][2], block_weight[TQ_HALVES][2];
  bool is_new_block = true;
  while (now.tile.begin < end) {
    const TqTile tile = now.tile;
    if (is_new_block) {
      // A key's logit is that of its code and that of its block's mean, which stands in all rows.
      is_new_block = false;
#pragma unroll
      for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
        for (uint i = 0; i < 2; ++i) {
          mean_logit[h][i] = 0.0f;
          block_weight[h][i] = 0.0f;
        }
      }
      if (has_k_means) {
        TqKeyPiece<16, 0> mean;
        tq_read_piece(reinterpret_cast<device const uchar*>(k_means + tile.row / params.block_size * TQ_HEAD_DIM),
                      tq_share(lane), TQ_SHARES, mean);
#pragma unroll
        for (uint h = 0; h < TQ_HALVES; ++h) {
          float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (uint step = 0; step < TQ_STEPS; ++step) {
            const uint a = mean.low_words[2 * step], b = mean.low_words[2 * step + 1];
            const uint left[4] = {a, a, b, b};
            tq_multiply(lane, left, queries.q[h][step], product);
          }
#pragma unroll
          for (uint i = 0; i < 2; ++i) mean_logit[h][i] = product[i] * queries.factor[h][i];
        }
      }
    }

    // In two sums, which need not wait for each other.
    float products[TQ_HALVES][2][4];
#pragma unroll
    for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
      for (uint i = 0; i < 4; ++i) {
        products[h][0][i] = 0.0f;
        products[h][1][i] = 0.0f;
      }
    }
    if (k_bits == 16) tq_read_keys(k, tile, lane, now.keys);
#pragma unroll
    for (uint eight = 0; eight < TQ_STEPS / 2; ++eight) {
      uint first[4], second[4];
      tq_pairs<k_bits>(now.keys[0], eight, tables, lane, first);
      tq_pairs<k_bits>(now.keys[1], eight, tables, lane, second);
#pragma unroll
      for (uint j = 0; j < 2; ++j) {
        const uint left[4] = {first[2 * j], second[2 * j], first[2 * j + 1], second[2 * j + 1]};
#pragma unroll
        for (uint h = 0; h < TQ_HALVES; ++h) tq_multiply(lane, left, queries.q[h][2 * eight + j], products[h][j]);
      }
    }
    // Whether all queries see all of the tile.
    const bool is_open = params.mask_batch == 0 && tile.begin + TQ_TILE == tile.end &&
                         tile.begin >= queries.all_begin && tile.end <= queries.all_end;
    float k_scale[2], v_norm[2], v_size[2];
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      k_scale[i] = now.k_norms[i] * k_factor;
      v_norm[i] = now.v_norms[i] * v_factor;
      if (!is_open && tile.begin + int(tq_column(lane) + 8 * i) >= tile.end) v_norm[i] = 0.0f;
      v_size[i] = v_bits == 16 ? 0.0f : fast::log2(max(v_norm[i], TQ_LEAST_NORM));
    }
    const int next_block_end = tile.end == tile.block_end ? tile.block_end + block_size : tile.block_end;
    const TqTile next = tq_tile(tile.end, end, next_block_end, tile.row + uint(tile.end - tile.begin), k.ring);
    const bool goes_on = next.begin < end;
    if (goes_on && k_bits != 16) tq_read_keys(k, next, lane, now.keys);

    uint weights[TQ_HALVES][2];
#pragma unroll
    for (uint h = 0; h < TQ_HALVES; ++h) {
      float logits[4], largest[2];
#pragma unroll
      for (uint i = 0; i < 4; ++i) {
        const float product = products[h][0][i] + products[h][1][i];
        logits[i] = fma(product, k_scale[i / 2] * queries.factor[h][i % 2], mean_logit[h][i % 2]);
      }
      if (params.softcap > 0.0f) {
        const float inverse = 1.0f / params.softcap;
#pragma unroll
        for (uint i = 0; i < 4; ++i) logits[i] = params.softcap * precise::tanh(logits[i] * inverse);
      }
      if (!is_open) tq_hide(queries, mask, params, lane, tile, h, logits);
#pragma unroll
      for (uint i = 0; i < 4; ++i) logits[i] *= TQ_LOG2_E;
#pragma unroll
      for (uint i = 0; i < 2; ++i) largest[i] = max(logits[i] + v_size[0], logits[2 + i] + v_size[1]);
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
      for (uint i = 0; i < 4; ++i) shares[i] = fast::exp2(logits[i] - gathered.largest[h][i % 2]);
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        gathered.sum[h][i] += shares[i] + shares[2 + i];
        block_weight[h][i] += shares[i] + shares[2 + i];
        weights[h][i] = tq_transpose(lane, tq_pack(shares[2 * i] * v_norm[i], shares[2 * i + 1] * v_norm[i]));
      }
    }

    // Once the norms of this tile are of no more use: registers that changed places would be waited for.
    if (goes_on) {
      tq_read_norms(k, next, lane, now.k_norms);
      tq_read_norms(v, next, lane, now.v_norms);
    }
    if (v_bits == 16) tq_read_values(v, tile, lane, now.values);
#pragma unroll
    for (uint eight = 0; eight < TQ_STEPS / 4; ++eight) {
      uint even[2][4], odd[2][4];
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        tq_across<v_bits>(now.values[2 * i], now.values[2 * i + 1], eight, v_table, lane, even[i], odd[i]);
      }
#pragma unroll
      for (uint j = 0; j < 4; ++j) {
        const uint left[4] = {even[0][j], odd[0][j], even[1][j], odd[1][j]};
#pragma unroll
        for (uint h = 0; h < TQ_HALVES; ++h) tq_multiply(lane, left, weights[h], gathered.out[h][4 * eight + j]);
      }
    }
    if (goes_on && v_bits != 16) tq_read_values(v, next, lane, now.values);

    if (tile.end == tile.block_end) {
      is_new_block = true;
      if (has_v_means) {
        TqValuePiece<16, 0> mean;
        tq_read_piece(reinterpret_cast<device const uchar*>(v_means + tile.row / params.block_size * TQ_HEAD_DIM),
                      tq_column(lane), TQ_COLUMNS, mean);
#pragma unroll
        for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
          for (uint i = 0; i < 2; ++i) block_weight[h][i] = tq_sum_of_columns(block_weight[h][i]);
#pragma unroll
          for (uint step = 0; step < TQ_STEPS; ++step) {
#pragma unroll
            for (uint i = 0; i < 4; ++i) {
              const float number = tq_unpack(mean.low_words[step], i / 2);
              gathered.out[h][step][i] = fma(block_weight[h][i % 2], number, gathered.out[h][step][i]);
            }
          }
        }
      }
    }
    now.tile = next;
  }
}

// Threads as in attend.metal.
//
// memory: the tables of K's and V's levels and TQ_QUERIES rows of queries; then, in the same place, for each simdgroup
// TQ_QUERIES rows of sums, and of each row the largest logit and the sum of weights.
[[max_total_threads_per_threadgroup(TQ_THREADS)]] kernel void tq_attend_matrix(
    device const TQ_INPUT* q [[buffer(0)]], device const uchar* k_codes [[buffer(1)]],
    device const float* k_norms [[buffer(2)]], device const half* k_means [[buffer(3)]],
    device const half* k_tail [[buffer(4)]], device const uchar* v_codes [[buffer(5)]],
    device const float* v_norms [[buffer(6)]], device const half* v_means [[buffer(7)]],
    device const half* v_tail [[buffer(8)]], device const uchar* mask [[buffer(9)]],
    device const int* starts [[buffer(10)]], device const int* lengths [[buffer(11)]],
    device float* partials [[buffer(12)]], constant TqAttendParams& params [[buffer(13)]],
    threadgroup uint* memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const uint heads_per_kv = params.num_heads / params.num_kv_heads;
  const uint rows = params.q_len * heads_per_kv;
  const uint tiles = (rows + TQ_QUERIES - 1) / TQ_QUERIES;
  const uint batch = group.z, kv_head = group.y / tiles, first_row = group.y % tiles * TQ_QUERIES;
  const uint used_rows = min(rows - first_row, uint(TQ_QUERIES));
  const int first = params.has_starts != 0 ? max(starts[batch], 0) : 0;
  const uint threads = simdgroups * TQ_SIMD_LANES, thread_index = simdgroup * TQ_SIMD_LANES + lane;
  int length = int(params.length);
  if (params.has_lengths != 0) length = clamp(lengths[batch], 0, length);

  // The positions that the first and the last query may see: no query sees what is before those of the first, or after
  // those of the last.
  const TqVisible oldest = tq_visible(params, batch, first, length, first_row / heads_per_kv);
  const TqVisible newest = tq_visible(params, batch, first, length, (first_row + used_rows - 1) / heads_per_kv);
  const int begin = oldest.begin, end = max(begin, newest.end);
  // This simdgroup's share: whole tiles, which begin at multiples of their size.
  const int parts = int(params.splits * simdgroups), part = int(group.x * simdgroups + simdgroup);
  const int first_tile = begin / TQ_TILE, tile_count = (end + TQ_TILE - 1) / TQ_TILE - first_tile;
  const int share = (tile_count + parts - 1) / parts;
  const int from = clamp((first_tile + part * share) * TQ_TILE, begin, end);
  const int to = clamp((first_tile + (part + 1) * share) * TQ_TILE, from, end);
  // The first tokens, what has been coded, and the newest tokens.
  const int coded_begin = TQ_TAIL ? clamp(first + int(params.sink_length), from, to) : from;
  const int coded_end = TQ_TAIL ? clamp(int(params.coded), coded_begin, to) : to;

  const ulong store = ulong(batch) * params.num_kv_heads + kv_head;
  const uint tail_rows = params.sink_length + params.tail_slots;
  const TqStore k = tq_store_of_head<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH>(k_codes, k_norms, k_means, k_tail, store,
                                                                     params.slots, params.block_size, tail_rows);
  const TqStore v = tq_store_of_head<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH>(v_codes, v_norms, v_means, v_tail, store,
                                                                     params.slots, params.block_size, tail_rows);
  TqRows<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH> k_rows;
  TqRows<TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH> v_rows;
  k_rows.rows = k.codes;
  v_rows.rows = v.codes;
  k_rows.norms = k.norms;
  v_rows.norms = v.norms;
  k_rows.ring = v_rows.ring = params.slots;
  k_rows.offset = v_rows.offset = 0;
  const int no_block = 0x20000000, block_size = TQ_K_MEANS || TQ_V_MEANS ? int(params.block_size) : no_block;
  TqAhead<TQ_K_BITS, TQ_K_LOW, TQ_K_HIGH, TQ_V_BITS, TQ_V_LOW, TQ_V_HIGH> coded;
  const TqTile coded_tile = tq_tile(coded_begin, coded_end, (coded_begin / block_size + 1) * block_size,
                                    uint(coded_begin) % max(params.slots, 1u), params.slots);
  coded.tile = coded_tile;
  // Before anything else, so that it need not be waited for.
  if (coded_begin < coded_end) tq_read_ahead(k_rows, v_rows, coded_tile, lane, coded);

  threadgroup float* query_rows = reinterpret_cast<threadgroup float*>(
      memory + max(TQ_TABLE_ENTRIES(TQ_K_BITS), TQ_TABLE_ENTRIES(TQ_V_BITS)) * 2 * TQ_SIMD_LANES);
  for (uint r = simdgroup * TQ_SIMD_ROWS; r < TQ_QUERIES; r += simdgroups * TQ_SIMD_ROWS) {
    // What is left of the last tile computes its last row again, and keeps it to itself.
    const uint place = r + lane / TQ_ROW_LANES;
    const uint row = min(first_row + place, rows - 1);
    const uint token = row / heads_per_kv, head = kv_head * heads_per_kv + row % heads_per_kv;
    TqRow numbers;
    tq_load(q + ((ulong(batch) * params.num_heads + head) * params.q_len + token) * TQ_HEAD_DIM, lane, numbers);
    if (params.rotate_q != 0) tq_rotate(lane, numbers);
    float peak = 0.0f;
#pragma unroll
    for (uint i = 0; i < TQ_LANE_DIMS; ++i) peak = max(peak, abs(numbers.x[i]));
    peak = tq_max(peak, TQ_ROW_LANES);
    if (place < TQ_QUERIES && tq_is_used(lane)) {
      const uint dim = tq_place(lane) * TQ_LANE_DIMS, chunk = dim / TQ_K_CHUNK;
      threadgroup float* to = query_rows + place * TQ_QUERY_STRIDE + chunk % TQ_SHARES * TQ_SHARE_STRIDE +
                              chunk / TQ_SHARES * TQ_K_CHUNK + dim % TQ_K_CHUNK;
#pragma unroll
      for (uint i = 0; i < TQ_LANE_DIMS; ++i) to[i] = numbers.x[i];
      if (tq_place(lane) == 0) query_rows[place * TQ_QUERY_STRIDE + TQ_HEAD_DIM / 4] = peak;
    }
  }
  if (TQ_K_BITS != 16) tq_make_table<(TQ_K_BITS)>(lane, simdgroup, simdgroups, memory);
  if (TQ_V_BITS != 16 && TQ_V_BITS != TQ_K_BITS) {
    tq_make_table<(TQ_V_BITS)>(lane, simdgroup, simdgroups, memory + TQ_SIMD_LANES);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  TqQueries queries;
  TqGathered gathered;
  queries.all_begin = newest.begin;
  queries.all_end = oldest.end;
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      const uint row = min(first_row + 8 * h + 2 * tq_share(lane) + i, rows - 1);
      const TqVisible seen = tq_visible(params, batch, first, length, row / heads_per_kv);
      queries.begin[h][i] = seen.begin;
      queries.end[h][i] = seen.end;
      queries.mask_row[h][i] = seen.mask_row;
      gathered.largest[h][i] = TQ_NO_LOGIT;
      gathered.sum[h][i] = 0.0f;
    }
    threadgroup const float* query = query_rows + (8 * h + tq_column(lane)) * TQ_QUERY_STRIDE;
    const float peak = query[TQ_HEAD_DIM / 4];
    // A power of 2, so that nothing is rounded but to half precision.
    const float power = as_type<float>(as_type<uint>(peak) & 0x7F800000u);
    const float unit = power > 0.0f ? power : 1.0f;
    const float inverse = 1.0f / unit;
    tq_across_columns(lane, unit * params.scale, queries.factor[h]);
#pragma unroll
    for (uint step = 0; step < TQ_STEPS; ++step) {
#pragma unroll
      for (uint i = 0; i < 2; ++i) {
        threadgroup const float* two = query + tq_share(lane) * TQ_SHARE_STRIDE + 4 * step + 2 * i;
        queries.q[h][step][i] = tq_pack(two[0] * inverse, two[1] * inverse);
      }
#pragma unroll
      for (uint i = 0; i < 4; ++i) gathered.out[h][step][i] = 0.0f;
    }
  }

  if (coded_begin < coded_end) {
    tq_walk<true>(queries, k_rows, v_rows, k.means, v.means, mask, memory, params, lane, coded_end, block_size, coded,
                  gathered);
  }
  if (TQ_TAIL) {
    for (uint i = 0; i < 2; ++i) {
      const int dense_begin = i == 0 ? from : coded_end, dense_end = i == 0 ? coded_begin : to;
      if (dense_begin >= dense_end) continue;
      TqRows<16, 16, 0> k_dense, v_dense;
      k_dense.rows = reinterpret_cast<device const uchar*>(k.tail);
      v_dense.rows = reinterpret_cast<device const uchar*>(v.tail);
      k_dense.norms = k.norms;
      v_dense.norms = v.norms;
      k_dense.ring = v_dense.ring = i == 0 ? params.sink_length : params.tail_slots;
      k_dense.offset = v_dense.offset = i == 0 ? 0 : params.sink_length;
      const uint row = i == 0 ? uint(from - first) : uint(coded_end) % params.tail_slots;
      TqAhead<16, 16, 0, 16, 16, 0> dense;
      const TqTile dense_tile = tq_tile(dense_begin, dense_end, dense_end, row, k_dense.ring);
      tq_read_ahead(k_dense, v_dense, dense_tile, lane, dense);
      tq_walk<false>(queries, k_dense, v_dense, k.means, v.means, mask, memory, params, lane, dense_end, no_block,
                     dense, gathered);
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // what is written next lies where tables and queries were
  threadgroup float* sums = reinterpret_cast<threadgroup float*>(memory);
  threadgroup float* scales = sums + simdgroups * TQ_QUERIES * TQ_SUMS_STRIDE;
#pragma unroll
  for (uint h = 0; h < TQ_HALVES; ++h) {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      const float sum = tq_sum_of_columns(gathered.sum[h][i]);
      if (8 * h + 2 * tq_share(lane) + i >= used_rows) continue;
      const uint row = simdgroup * TQ_QUERIES + 8 * h + 2 * tq_share(lane) + i;
      if (tq_column(lane) == 0) {
        scales[2 * row] = sum;
        scales[2 * row + 1] = gathered.largest[h][i];
      }
#pragma unroll
      for (uint n = 0; n < 2 * TQ_STEPS; ++n) {
        sums[row * TQ_SUMS_STRIDE + n * TQ_COLUMNS + tq_column(lane)] = gathered.out[h][n / 2][n % 2 * 2 + i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // As attend.metal leaves them.
  const ulong all_rows = ulong(params.batch) * params.num_heads * params.q_len;
  for (uint i = thread_index; i < used_rows * TQ_HEAD_DIM; i += threads) {
    const uint row = i / TQ_HEAD_DIM, place = i % TQ_HEAD_DIM;
    float largest = TQ_NO_LOGIT, sum = 0.0f, number = 0.0f;
    for (uint s = 0; s < simdgroups; ++s) largest = max(largest, scales[(s * TQ_QUERIES + row) * 2 + 1]);
#pragma unroll 4
    for (uint s = 0; s < simdgroups; ++s) {
      const uint from_row = s * TQ_QUERIES + row;
      const float factor = fast::exp2(scales[from_row * 2 + 1] - largest);
      sum = fma(scales[from_row * 2], factor, sum);
      number = fma(sums[from_row * TQ_SUMS_STRIDE + place], factor, number);
    }
    const ulong at = (store * rows + first_row + row) * params.splits + group.x;
    partials[at * TQ_HEAD_DIM + tq_value_dim(place % TQ_COLUMNS, place / TQ_COLUMNS)] = number;
    if (place == 0) {
      device float* scale = partials + all_rows * params.splits * TQ_HEAD_DIM + at * 2;
      scale[0] = sum;
      scale[1] = largest / TQ_LOG2_E;
    }
  }
}
