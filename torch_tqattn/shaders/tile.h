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

// Positions at most 16 apart, whose rows follow each other from row `row` of the ring on.
struct TqTile {
  int begin;
  int end;
  uint row;
  int block_end;  // of the positions that share a mean
};

static inline TqTile tq_tile(int begin, int end, int block_end, uint row, uint ring) {
  TqTile tile;
  tile.begin = begin;
  tile.row = row >= ring ? row - ring : row;
  tile.block_end = min(end, block_end);
  tile.end = min(begin + int(min(ring - tile.row, uint(TQ_TILE))), tile.block_end);
  return tile;
}

// One side of the store, and where tiles' rows are in it.
template <uint bits, uint low, uint high>
struct TqRows {
  device const uchar* rows;
  device const float* norms;
  uint ring;
  uint offset;
};

// The row of the tile's i-th position. Codes that follow the tile do no harm, and are there up to the ring's end;
// numbers that follow it might be none.
template <uint bits, uint low, uint high>
static inline uint tq_last_row(thread const TqRows<bits, low, high>& side, thread const TqTile& tile) {
  if (bits == 16) return uint(tile.end - tile.begin) - 1;
  return min(side.ring - tile.row, uint(TQ_TILE)) - 1;
}

template <uint bits, uint low, uint high>
static inline device const uchar* tq_row_at(thread const TqRows<bits, low, high>& side, uint slot) {
  return side.rows + ulong(side.offset + slot) * TQ_SLOT_BYTES(bits, low, high);
}

// Of keys a lane has rows tq_column(lane) and 8 further.
template <uint bits, uint low, uint high>
static inline void tq_read_keys(thread const TqRows<bits, low, high>& side, thread const TqTile& tile, uint lane,
                                thread TqKeyPiece<low, high> (&keys)[2]) {
  const uint last = tq_last_row(side, tile), column = tq_column(lane);
  if (last == TQ_TILE - 1) {
    device const uchar* row = tq_row_at(side, tile.row + column);
    tq_read_piece(row, tq_share(lane), TQ_SHARES, keys[0]);
    tq_read_piece(row + 8 * TQ_SLOT_BYTES(bits, low, high), tq_share(lane), TQ_SHARES, keys[1]);
  } else {
    tq_read_piece(tq_row_at(side, tile.row + min(column, last)), tq_share(lane), TQ_SHARES, keys[0]);
    tq_read_piece(tq_row_at(side, tile.row + min(column + 8, last)), tq_share(lane), TQ_SHARES, keys[1]);
  }
}

// Of values a lane has rows 2 s and 2 s + 1, with s = tq_share(lane), and those 8 further.
template <uint bits, uint low, uint high>
static inline void tq_read_values(thread const TqRows<bits, low, high>& side, thread const TqTile& tile, uint lane,
                                  thread TqValuePiece<low, high> (&values)[4]) {
  const uint last = tq_last_row(side, tile), first = 2 * tq_share(lane);
  if (last == TQ_TILE - 1) {
    device const uchar* row = tq_row_at(side, tile.row + first);
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      tq_read_piece(row + (i / 2 * 8 + i % 2) * TQ_SLOT_BYTES(bits, low, high), tq_column(lane), TQ_COLUMNS, values[i]);
    }
  } else {
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint row = min(first + i / 2 * 8 + i % 2, last);
      tq_read_piece(tq_row_at(side, tile.row + row), tq_column(lane), TQ_COLUMNS, values[i]);
    }
  }
}

// Of positions tq_column(lane) and 8 further.
template <uint bits, uint low, uint high>
static inline void tq_read_norms(thread const TqRows<bits, low, high>& side, thread const TqTile& tile, uint lane,
                                 thread float (&norms)[2]) {
  const uint last = tq_last_row(side, tile);
#pragma unroll
  for (uint i = 0; i < 2; ++i) {
    norms[i] = 1.0f;
    if (bits != 16) norms[i] = side.norms[side.offset + tile.row + min(tq_column(lane) + 8 * i, last)];
  }
}

// A tile that has been read. Codes are read one tile ahead; dense rows would take too many registers for that.
template <uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high>
struct TqAhead {
  TqTile tile;
  TqKeyPiece<k_low, k_high> keys[2];
  TqValuePiece<v_low, v_high> values[4];
  float k_norms[2];
  float v_norms[2];
};

template <uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high>
static inline void tq_read_ahead(thread const TqRows<k_bits, k_low, k_high>& k,
                                 thread const TqRows<v_bits, v_low, v_high>& v, thread const TqTile& tile, uint lane,
                                 thread TqAhead<k_bits, k_low, k_high, v_bits, v_low, v_high>& ahead) {
  ahead.tile = tile;
  if (k_bits != 16) tq_read_keys(k, tile, lane, ahead.keys);
  if (v_bits != 16) tq_read_values(v, tile, lane, ahead.values);
  tq_read_norms(k, tile, lane, ahead.k_norms);
  tq_read_norms(v, tile, lane, ahead.v_norms);
}
