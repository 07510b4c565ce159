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

template <uint bits, uint low, uint high, bool is_whole>
static inline TqRows<bits, low, high, is_whole> tq_rows(device const uchar* rows, device const float* norms,
                                                        uint ring) {
  TqRows<bits, low, high, is_whole> side;
  side.rows = rows;
  side.norms = norms;
  side.ring = ring;
  return side;
}

// The row of the tile's i-th position. Codes that follow the tile do no harm, and are there up to the ring's end;
// numbers that follow it might be none.
template <uint bits, uint low, uint high, bool is_whole>
static inline uint tq_last_row(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile) {
  if (is_whole) return TQ_TILE - 1;
  if (bits == 16) return uint(tile.end - tile.begin) - 1;
  return min(side.ring - tile.row, uint(TQ_TILE)) - 1;
}

// Of keys a lane has rows tq_column(lane) and 8 further.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_keys(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                uint lane, thread TqKeyPiece<low, high> (&keys)[2]) {
  const uint last = tq_last_row(side, tile), bytes = TQ_SLOT_BYTES(bits, low, high);
  if (last == TQ_TILE - 1) {
    const uint row = (tile.row + tq_column(lane)) * bytes;
    tq_read_piece(side.rows, row, 0, tq_share(lane), TQ_SHARES, keys[0]);
    tq_read_piece(side.rows, row, 8 * bytes, tq_share(lane), TQ_SHARES, keys[1]);
  } else {
#pragma unroll
    for (uint i = 0; i < 2; ++i) {
      const uint row = (tile.row + min(tq_column(lane) + 8 * i, last)) * bytes;
      tq_read_piece(side.rows, row, 0, tq_share(lane), TQ_SHARES, keys[i]);
    }
  }
}

// Of values a lane has rows 2 s and 2 s + 1, with s = tq_share(lane), and those 8 further.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_values(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                  uint lane, thread TqValuePiece<low, high> (&values)[4]) {
  const uint last = tq_last_row(side, tile), bytes = TQ_SLOT_BYTES(bits, low, high), first = 2 * tq_share(lane);
  if (last == TQ_TILE - 1) {
    const uint row = (tile.row + first) * bytes;
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      tq_read_piece(side.rows, row, (i / 2 * 8 + i % 2) * bytes, tq_column(lane), TQ_COLUMNS, values[i]);
    }
  } else {
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint row = (tile.row + min(first + i / 2 * 8 + i % 2, last)) * bytes;
      tq_read_piece(side.rows, row, 0, tq_column(lane), TQ_COLUMNS, values[i]);
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

// Of positions tq_column(lane) and 8 further.
template <uint bits, uint low, uint high, bool is_whole>
static inline void tq_read_norms(thread const TqRows<bits, low, high, is_whole>& side, thread const TqTile& tile,
                                 uint lane, thread float (&norms)[2]) {
  if (bits == 16) return;  // they have none
  const uint last = tq_last_row(side, tile);
  if (last == TQ_TILE - 1) {
    const uint row = tile.row + tq_column(lane);
    norms[0] = side.norms[row];
    norms[1] = (side.norms + 8)[row];
  } else {
    norms[0] = side.norms[tile.row + min(tq_column(lane), last)];
    norms[1] = side.norms[tile.row + min(tq_column(lane) + 8, last)];
  }
}

// A tile that has been read. Codes are read one tile ahead; dense rows would take
// too many registers for that.
template <uint k_bits, uint k_low, uint k_high, uint v_bits, uint v_low, uint v_high>
struct TqAhead {
  TqTile tile;
  TqKeyPiece<k_low, k_high> keys[2];
  TqValuePiece<v_low, v_high> values[4];
  float k_norms[2];
  float v_norms[2];
};
