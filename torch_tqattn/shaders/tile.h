// Tiles of 16 positions: where their rows are in a store, and what each lane reads of them (matrix.h).
#pragma once

#include "matrix.h"
#include "store.h"

#define TQ_TILE 16  // positions at a time
// Numbers that a lane has next to each other of a key, and of a value: 16 bytes of 4-bit codes, and 8, where they fit.
#define TQ_K_CHUNK (TQ_HEAD_DIM % 128 == 0 ? 32u : 16u)
#define TQ_V_CHUNK (TQ_K_CHUNK / 2)
#define TQ_CHUNKS (TQ_HEAD_DIM / TQ_K_CHUNK / TQ_SHARES)

template <uint low, uint high>
using TqKeyPiece = TqPiece<low, high, TQ_K_CHUNK, TQ_CHUNKS>;
template <uint low, uint high>
using TqValuePiece = TqPiece<low, high, TQ_V_CHUNK, TQ_CHUNKS>;

// Which number of a row is number i of a column of values.
static inline uint tq_value_dim(uint column, uint i) {
  return (i / TQ_V_CHUNK * TQ_COLUMNS + column) * TQ_V_CHUNK + i % TQ_V_CHUNK;
}

// Positions at most 16 apart, whose rows follow each other from row `row` of a ring on.
struct TqTile {
  int begin;
  int end;
  uint row;
};

// One side of the store of a head. Its bytes are counted in 32 bits, which plan.cpp sees to.
//
// is_whole: the ring is cut into whole tiles, and so are blocks, if there are any. Else a tile may end with the ring,
// with its block, or with what is read.
template <uint bits, uint low, uint high, bool is_whole>
struct TqRows {
  device const uchar* rows;
  device const float* norms;
  uint ring;
};
using TqDenseRows = TqRows<16, 16, 0, false>;

// The tile that begins at `begin`, of rows up to `end`.
template <bool is_whole>
static inline TqTile tq_tile(int begin, int end, uint row, uint ring) {
  TqTile tile;
  tile.begin = begin;
  tile.row = row >= ring ? row - ring : row;
  tile.end = begin + TQ_TILE;
  if (!is_whole) tile.end = min(end, begin + int(min(ring - tile.row, uint(TQ_TILE))));
  return tile;
}

// The row of the tile's i-th position. Codes that follow the tile do no harm, and are there up to the ring's end;
// numbers that follow it might be none.
template <uint bits, uint low, uint high, bool is_whole>
static inline uint tq_last_row(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile) {
  if (is_whole) return TQ_TILE - 1;
  if (bits == 16) return uint(tile.end - tile.begin) - 1;
  return min(side.ring - tile.row, uint(TQ_TILE)) - 1;
}

// Whether a side's codes and norms are asked for a tile ahead, into threadgroup memory.
#define TQ_IS_STAGED(bits, is_whole) ((bits) != 16 && (is_whole) && TQ_STAGED)

// There each simdgroup has room for a tile: for K's codes, V's, K's norms and V's.
#define TQ_STAGED_V (TQ_K_BITS == 16 ? 0 : TQ_TILE * TQ_STAGED_K_ROW(TQ_ROW_BYTES(TQ_K_LOW, TQ_K_HIGH)))
#define TQ_STAGED_K_NORMS \
  (TQ_STAGED_V + (TQ_V_BITS == 16 ? 0 : TQ_TILE * TQ_STAGED_V_ROW(TQ_ROW_BYTES(TQ_V_LOW, TQ_V_HIGH))))
#define TQ_STAGED_V_NORMS (TQ_STAGED_K_NORMS + (TQ_K_BITS == 16 ? 0 : TQ_TILE * 4))
#define TQ_STAGE_BYTES (TQ_STAGED_V_NORMS + (TQ_V_BITS == 16 ? 0 : TQ_TILE * 4))

struct TqStage {
  threadgroup uchar* memory;
  int next;  // the position, and the row, of the tile that is asked for next
  uint row;
  // What this lane asks for: of K's codes, of V's, and of the norms of one. Where it is for row 0, and where it goes.
  device const uchar* k;
  device const uchar* v;
  device const uchar* norms;
  uint k_to;
  uint v_to;
  uint norms_to;
};

template <uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high, bool is_whole>
static inline TqStage tq_stage(thread const TqRows<k_bits, k_low, k_high, is_whole>& k,
                               thread const TqRows<v_bits, v_low, v_high, is_whole>& v, threadgroup uchar* memory,
                               uint lane) {
  const uint k_bytes = TQ_ROW_BYTES(k_low, k_high), v_bytes = TQ_ROW_BYTES(v_low, v_high);
  TqStage stage;
  stage.memory = memory;
  stage.next = 0;
  stage.row = 0;
  stage.k = k.rows + 16 * lane;
  stage.v = v.rows + 16 * lane;
  stage.norms = tq_bytes(k_bits != 16 && lane < 4 ? k.norms : v.norms) + lane % 4 * 16;
  stage.k_to = tq_staged_byte<k_bytes, TQ_STAGED_K_ROW(k_bytes)>(16 * lane);
  stage.v_to = TQ_STAGED_V + tq_staged_byte<v_bytes, TQ_STAGED_V_ROW(v_bytes)>(16 * lane);
  stage.norms_to = TQ_STAGED_K_NORMS + 16 * lane;
  tq_keep(stage.k);
  tq_keep(stage.v);
  tq_keep(stage.norms);
  tq_keep(stage.k_to);
  tq_keep(stage.v_to);
  return stage;
}

// Asks for the next tile, if there is one before `end`.
template <uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high, bool is_whole>
static inline void tq_ask_for_tile(thread const TqRows<k_bits, k_low, k_high, is_whole>& k,
                                   thread const TqRows<v_bits, v_low, v_high, is_whole>& v, int end, uint lane,
                                   thread TqStage& stage) {
  const uint k_bytes = TQ_ROW_BYTES(k_low, k_high), v_bytes = TQ_ROW_BYTES(v_low, v_high);
  if (stage.next < end) {
    if (k_bits != 16) {
      tq_ask_for_rows<k_bytes, TQ_STAGED_K_ROW(k_bytes)>(stage.k + stage.row * k_bytes, stage.memory + stage.k_to,
                                                         lane);
    }
    if (v_bits != 16) {
      tq_ask_for_rows<v_bytes, TQ_STAGED_V_ROW(v_bytes)>(stage.v + stage.row * v_bytes, stage.memory + stage.v_to,
                                                         lane);
    }
    if (stage.norms_to < TQ_STAGE_BYTES) {
      tq_ask_for_bytes(stage.norms + stage.row * 4, stage.memory + stage.norms_to);
    }
  }
  stage.next += TQ_TILE;
  stage.row += TQ_TILE;
  if (stage.row == k.ring) stage.row = 0;
}

static inline TqNear tq_staged(thread const TqStage& stage, uint at) {
  TqNear staged;
  staged.bytes = stage.memory + at;
  return staged;
}

// Of keys a lane has rows tq_column(lane) and 8 further.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_keys(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                thread const TqStage& stage, uint lane, thread TqKeyPiece<low, high> (&keys)[2]) {
  const uint bytes = TQ_SLOT_BYTES(bits, low, high), stride = TQ_STAGED_K_ROW(bytes), last = tq_last_row(side, tile);
#pragma unroll
  for (uint i = 0; i < 2; ++i) {
    const uint place = tq_share(lane), row = tq_column(lane), further = 8 * i;
    if (TQ_IS_STAGED(bits, is_whole)) {
      tq_read_piece(tq_staged(stage, 0), row * stride, further * stride, place, TQ_SHARES, keys[i]);
    } else if (last == TQ_TILE - 1) {
      tq_read_piece(tq_far(side.rows), (tile.row + row) * bytes, further * bytes, place, TQ_SHARES, keys[i]);
    } else {
      tq_read_piece(tq_far(side.rows), (tile.row + min(row + further, last)) * bytes, 0, place, TQ_SHARES, keys[i]);
    }
  }
}

// Of values a lane has rows 2 s and 2 s + 1, with s = tq_share(lane), and those 8 further.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_values(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                  thread const TqStage& stage, uint lane, thread TqValuePiece<low, high> (&values)[4]) {
  const uint bytes = TQ_SLOT_BYTES(bits, low, high), stride = TQ_STAGED_V_ROW(bytes), last = tq_last_row(side, tile);
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const uint place = tq_column(lane), row = 2 * tq_share(lane), further = i / 2 * 8 + i % 2;
    if (TQ_IS_STAGED(bits, is_whole)) {
      tq_read_piece(tq_staged(stage, TQ_STAGED_V), row * stride, further * stride, place, TQ_COLUMNS, values[i]);
    } else if (last == TQ_TILE - 1) {
      tq_read_piece(tq_far(side.rows), (tile.row + row) * bytes, further * bytes, place, TQ_COLUMNS, values[i]);
    } else {
      tq_read_piece(tq_far(side.rows), (tile.row + min(row + further, last)) * bytes, 0, place, TQ_COLUMNS, values[i]);
    }
  }
}

// Clears those of a tile's dense values that have a NaN or an infinity, in all lanes. Bit n: that of position n had
// one.
template <uint low, uint high>
static inline uint tq_spoilt_values(uint lane, thread TqValuePiece<low, high> (&values)[4]) {
  uint spoilt = 0;
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    uint carries = 0;  // where all bits of an exponent are set
#pragma unroll
    for (uint w = 0; w < sizeof(values[i].low_words) / sizeof(uint); ++w) {
      carries |= (values[i].low_words[w] & 0x7C007C00u) + 0x04000400u;
    }
    if ((carries & 0x80008000u) != 0) spoilt |= 1u << (2 * tq_share(lane) + i / 2 * 8 + i % 2);
  }
#pragma unroll
  for (uint step = 1; step < TQ_SIMD_LANES; step *= 2) spoilt |= simd_shuffle_xor(spoilt, ushort(step));
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const bool is_spoilt = (spoilt >> (2 * tq_share(lane) + i / 2 * 8 + i % 2) & 1u) != 0;
#pragma unroll
    for (uint w = 0; w < sizeof(values[i].low_words) / sizeof(uint); ++w) {
      if (is_spoilt) values[i].low_words[w] = 0;
    }
  }
  return spoilt;
}

// Of positions tq_column(lane) and 8 further. staged_at: where in a stage they are.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_norms(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                 thread const TqStage& stage, uint staged_at, uint lane, thread float (&norms)[2]) {
  const uint last = tq_last_row(side, tile);
#pragma unroll
  for (uint i = 0; i < 2; ++i) {
    const uint row = tq_column(lane) + 8 * i;
    if (bits == 16) {
      norms[i] = 1.0f;  // they have none
    } else if (TQ_IS_STAGED(bits, is_whole)) {
      norms[i] = tq_staged(stage, staged_at).get<float>(row * 4);
    } else {
      norms[i] = side.norms[tile.row + min(row, last)];
    }
  }
}

// Has a tile's rows and norms fetched.
template <bool is_shared, uint bits, uint low, uint high, bool is_whole>
static inline void tq_fetch_tile(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                 uint lane) {
  const uint bytes = TQ_SLOT_BYTES(bits, low, high);
  tq_fetch_rows<bytes, is_shared>(side.rows, tile.row * bytes, lane);
  if (bits != 16 && lane < 2) tq_fetch<is_shared>(tq_bytes(side.norms + tile.row + 8 * lane));
}
