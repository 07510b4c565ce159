// Products of small matrices of half precision by a simdgroup, and what they are made of: parts of rows, decoded
// through tables in threadgroup memory.
//
// Lane l is in column `tq_column(l)` = l / 4 of the right-hand matrix and has every 4th pair of the numbers in it:
// `tq_share(l)` = l % 4 says which. That is the layout of NVIDIA's mma instructions.
#pragma once

#include "codes.h"
#include "params.h"
#include "words.h"

#define TQ_COLUMNS 8u
#define TQ_SHARES 4u

static inline uint tq_column(uint lane) { return lane / TQ_SHARES; }
static inline uint tq_share(uint lane) { return lane % TQ_SHARES; }

// Two numbers of half precision, the first in the lower bits.
static inline uint tq_pack(float first, float second) {
  return uint(as_type<ushort>(half(first))) | uint(as_type<ushort>(half(second))) << 16;
}

// The power of 2 that x >= 0 is 1 to 2 times of, or 1 for 0.
static inline float tq_power_of_two(float x) {
  const float power = as_type<float>(as_type<uint>(x) & 0x7F800000u);
  return power > 0.0f ? power : 1.0f;
}

// The lower halves of two pairs, and the upper ones.
static inline uint tq_lower(uint first, uint second) { return (first & 0xFFFFu) | second << 16; }
static inline uint tq_upper(uint first, uint second) { return first >> 16 | (second & 0xFFFF0000u); }

// out += left * right: [16, 16] * [16, 8]. Of left a lane has rows c and c + 8, of out rows c and c + 8 and columns
// 2 s and 2 s + 1, of right column c; with c = tq_column(lane), s = tq_share(lane). Along the sum it has numbers 2 s
// and 2 s + 1 in left[0], left[1] and right[0], those 8 further in left[2], left[3] and right[1].
static inline void tq_multiply(uint lane, thread const uint (&left)[4], thread const uint (&right)[2],
                               thread float (&out)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
  for (uint from = 0; from < TQ_SHARES; ++from) {
    for (uint part = 0; part < 2; ++part) {
      uint rows[2], columns[2];
      for (uint i = 0; i < 2; ++i) {
        rows[i] = simd_shuffle(left[2 * part + i], ushort(tq_column(lane) * TQ_SHARES + from));
        columns[i] = simd_shuffle(right[part], ushort((2 * tq_share(lane) + i) * TQ_SHARES + from));
      }
      for (uint which = 0; which < 2; ++which) {
        for (uint i = 0; i < 4; ++i) {
          out[i] = fma(tq_unpack(rows[i / 2], which), tq_unpack(columns[i % 2], which), out[i]);
        }
      }
    }
  }
#endif
}

// A matrix [8, 8] of half precision, transposed. Of each a lane has numbers 2 s and 2 s + 1 of row c.
static inline uint tq_transpose(uint lane, uint pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
#else
  const uint first = simd_shuffle(pair, ushort(2 * tq_share(lane) * TQ_SHARES + tq_column(lane) / 2));
  const uint second = simd_shuffle(pair, ushort((2 * tq_share(lane) + 1) * TQ_SHARES + tq_column(lane) / 2));
  return tq_column(lane) % 2 == 0 ? tq_lower(first, second) : tq_upper(first, second);
#endif
}

// Rows. A row is cut into chunks of `chunk` numbers, which `places` lanes take in turn. What a lane has of a row in
// planes of `low` and `high` bits, in numbers of 16 bits or in codes:

#define TQ_WORDS(bits, chunk, chunks) ((chunks) * ((chunk) * (bits) < 32 ? 1 : (chunk) * (bits) / 32))

template <uint low, uint high, uint chunk, uint chunks>
struct TqPiece {
  uint low_words[TQ_WORDS(low, chunk, chunks)];
  uint high_words[TQ_WORDS(high, chunk, chunks)];
};

// Has a mean fetched, so that it is near when it is read.
static inline void tq_fetch_mean(device const half* mean, uint lane) {
  if (lane < TQ_HEAD_DIM / 16) tq_fetch<false>(tq_bytes(mean + 16 * lane));
}

// Has a tile of rows from byte `at` on fetched.
template <uint row_bytes, bool is_shared>
static inline void tq_fetch_rows(device const uchar* rows, uint at, uint lane) {
#pragma unroll
  for (uint byte = 0; byte < 16 * row_bytes; byte += 32 * TQ_SIMD_LANES) {
    if (16 * row_bytes >= byte + 32 * TQ_SIMD_LANES || byte + 32 * lane < 16 * row_bytes) {
      tq_fetch<is_shared>(rows + at + byte + 32 * lane);
    }
  }
}

// Has the compiler keep what is found here in registers, where it would find it again at every use.
static inline void tq_keep(thread uint& number) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(number));
#endif
}
static inline void tq_keep(thread device const uchar*& pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
}

// Memory of the threadgroup is filled while a simdgroup does something else, where a GPU can do that: lanes ask for
// bytes, 16 at a time, and all wait together until all that they have asked for are there.
static inline void tq_ask_for_bytes(device const uchar* from, threadgroup uchar* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
#else
  *reinterpret_cast<threadgroup uint4*>(to) = *reinterpret_cast<device const uint4*>(from);
#endif
}

// Where byte `at` of a tile's rows goes if they are `stride` bytes apart there.
template <uint bytes, uint stride>
static inline uint tq_staged_byte(uint at) {
  return at / bytes * stride + at % bytes;
}

// Rows of a tile, each lane 16 bytes of each 512. from, to: where this lane's first ones are and go.
template <uint bytes, uint stride>
static inline void tq_ask_for_rows(device const uchar* from, threadgroup uchar* to, uint lane) {
  const uint at_once = 16 * TQ_SIMD_LANES;
#pragma unroll
  for (uint at = 0; at < 16 * bytes; at += at_once) {
    uint further = tq_staged_byte<bytes, stride>(at);  // the same for all lanes, if rows end where lanes begin again
    if (at_once % bytes != 0) {
      further = tq_staged_byte<bytes, stride>(at + 16 * lane) - tq_staged_byte<bytes, stride>(16 * lane);
    }
    if (at + at_once <= 16 * bytes || at + 16 * lane < 16 * bytes) tq_ask_for_bytes(from + at, to + further);
  }
}

static inline void tq_wait_for_bytes() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Of the row at byte `at + offset` of `rows`. The offset should be a constant: then it takes no instruction.
template <uint low, uint high, uint chunk, uint chunks, typename Bytes>
static inline void tq_read_piece(thread const Bytes& rows, uint at, uint offset, uint place, uint places,
                                 thread TqPiece<low, high, chunk, chunks>& piece) {
  Bytes low_plane = rows, high_plane = rows;
  low_plane.bytes += at + place * (chunk * low / 8);
  high_plane.bytes += at + place * (chunk * high / 8);
  const uint high_offset = offset + TQ_HEAD_DIM * low / 8;
#pragma unroll
  for (uint n = 0; n < chunks; ++n) {
    tq_read<chunk * low / 8>(low_plane, offset + n * places * (chunk * low / 8),
                             piece.low_words + n * TQ_WORDS(low, chunk, 1));
    if (high != 0) {
      tq_read<(high != 0 ? chunk * high / 8 : 1)>(high_plane, high_offset + n * places * (chunk * high / 8),
                                                  piece.high_words + n * TQ_WORDS(high, chunk, 1));
    }
  }
}

// The bits of the numbers 8 i to 8 i + 7 of a piece's plane, at most 4 bits each.
template <uint bits, uint chunk>
static inline uint tq_eight(thread const uint* words, uint i) {
  const uint bit = 8 * i % chunk * bits;
  const uint word = words[8 * i / chunk * TQ_WORDS(bits, chunk, 1) + bit / 32] >> bit % 32;
  return bits >= 4 ? word : word & ((1u << (8 * bits % 32)) - 1u);
}

// Eight numbers of 1 or 2 bits, each in 4 bits of its own.
template <uint bits>
static inline uint tq_spread(uint x) {
  if (bits == 1) {
    x = (x | x << 12) & 0x000F000Fu;
    x = (x | x << 6) & 0x03030303u;
    x = (x | x << 3) & 0x11111111u;
  } else {
    x = (x | x << 8) & 0x00FF00FFu;
    x = (x | x << 4) & 0x0F0F0F0Fu;
    x = (x | x << 2) & 0x33333333u;
  }
  return x;
}

// Eight codes, in bytes. Of planes of 8 bits: codes 0 to 3 and 4 to 7. Else the even and the odd ones; of at most 4
// bits each with the one that follows it.
struct TqEight {
  uint first;
  uint second;
};

template <uint bits, uint low, uint high, uint chunk, uint chunks>
static inline TqEight tq_codes_of(thread const TqPiece<low, high, chunk, chunks>& piece, uint i) {
  TqEight codes;
  if (low == 8) {
    const uint mask = 0x01010101u * ((1u << bits % 8) - 1u);  // whatever a foreign buffer holds
    codes.first = bits < 8 ? piece.low_words[2 * i] & mask : piece.low_words[2 * i];
    codes.second = bits < 8 ? piece.low_words[2 * i + 1] & mask : piece.low_words[2 * i + 1];
  } else {
    uint codes_low = tq_eight<(low < 8 ? low : 4), chunk>(piece.low_words, i);
    if (low == 2) codes_low = tq_spread<2>(codes_low);
    uint codes_high = 0;
    if (high != 0) codes_high = tq_spread<high>(tq_eight<(high != 0 ? high : 1), chunk>(piece.high_words, i));
    if (bits <= 4) {
      codes.first = codes_low | codes_high << 2;
      codes.second = codes.first >> 4;
    } else {
      codes.first = (codes_low & 0x0F0F0F0Fu) | (codes_high & 0x0F0F0F0Fu) << 4;
      codes.second = (codes_low >> 4 & 0x0F0F0F0Fu) | (codes_high & 0xF0F0F0F0u);
    }
  }
  return codes;
}

// Tables. Each lane has a copy of its own, so that no two lanes ever need the same memory bank at once; the copies of
// an entry of K's table are followed by those of V's. Entry c is the level of code c, twice; or, for codes of at most 4
// bits, the levels of codes c % 16 and c / 16.

// The level that this lane keeps to make a table: all are asked for at once, and early. Of codes of at most 4 bits that
// of code `lane`; else lanes have those of the next 8 times that their simdgroup writes four entries, from `four` on.
template <uint bits>
static inline float tq_level_for_table(uint lane, uint four, uint simdgroups) {
  if (bits == 16) return 0.0f;
  const uint entry = bits <= 4 ? lane : four + lane / 4 * 4 * simdgroups + lane % 4;
  return tq_level<(bits == 16 ? 8 : bits)>(entry % (1u << bits % 16));
}

// A simdgroup writes four entries at a time, a lane four copies of one. level: for the first 8 times.
template <uint bits>
static inline void tq_make_table(uint lane, uint simdgroup, uint simdgroups, float level, threadgroup uint* table) {
  const uint codes = 1u << bits % 16, step = 4 * simdgroups;
#pragma unroll 1
  for (uint first_four = 4 * simdgroup; first_four < TQ_TABLE_ENTRIES(bits); first_four += 8 * step) {
    if (bits > 4 && first_four >= step) level = tq_level_for_table<bits>(lane, first_four, simdgroups);
#pragma unroll
    for (uint i = 0; i < 8; ++i) {
      const uint four = first_four + i * step, entry = four + lane / 8;
      if (four >= TQ_TABLE_ENTRIES(bits)) continue;
      const float first = simd_shuffle(level, ushort(bits <= 4 ? entry % codes : 4 * i + lane / 8));
      const float second = bits <= 4 ? simd_shuffle(level, ushort(entry / 16 % codes)) : first;
      const uint pair = tq_pack(first, second);
      uint4 copies;
      copies.x = copies.y = copies.z = copies.w = pair;
      *reinterpret_cast<threadgroup uint4*>(table + entry * 2 * TQ_SIMD_LANES + lane % 8 * 4) = copies;
    }
  }
}

// Entry number byte `i` of `bytes`, of the lane's copy.
static inline uint tq_look_up(threadgroup const uint* table, uint lane, uint bytes, uint i) {
#ifdef __CUDA_ARCH__
  const uint at = __byte_perm(bytes, 4 * lane, 0x5504 | i << 4);  // one instruction
#else
  const uint at = (bytes >> 8 * i & 0xFFu) << 8 | 4 * lane;
#endif
  return *reinterpret_cast<threadgroup const uint*>(reinterpret_cast<threadgroup const uchar*>(table) + at);
}

// The level of code number i of eight, of more than 4 bits each, twice.
template <uint low>
static inline uint tq_level_of(threadgroup const uint* table, uint lane, thread const TqEight& codes, uint i) {
  if (low == 8) return tq_look_up(table, lane, i < 4 ? codes.first : codes.second, i % 4);
  return tq_look_up(table, lane, i % 2 == 0 ? codes.first : codes.second, i / 2);
}

// Numbers 2 i and 2 i + 1, i < 4, of the piece's eight numbers from 8 * eight on.
template <uint bits, uint low, uint high, uint chunk, uint chunks>
static inline void tq_pairs(thread const TqPiece<low, high, chunk, chunks>& piece, uint eight,
                            threadgroup const uint* table, uint lane, thread uint (&pairs)[4]) {
  if (bits == 16) {
#pragma unroll
    for (uint i = 0; i < 4; ++i) pairs[i] = piece.low_words[4 * eight + i];
  } else {
    const TqEight codes = tq_codes_of<bits>(piece, eight);
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      if (bits <= 4) {
        pairs[i] = tq_look_up(table, lane, codes.first, i);
      } else {
        pairs[i] =
            tq_lower(tq_level_of<low>(table, lane, codes, 2 * i), tq_level_of<low>(table, lane, codes, 2 * i + 1));
      }
    }
  }
}

// The lower four bits of each byte of `lower` and the upper four of `upper`.
static inline uint tq_nibbles(uint lower, uint upper) {
#ifdef __CUDA_ARCH__
  uint both;  // one instruction, which the compiler does not find
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(both) : "r"(lower), "r"(upper), "r"(0x0F0F0F0Fu));
  return both;
#else
  return (lower & 0x0F0F0F0Fu) | (upper & 0xF0F0F0F0u);
#endif
}

// Numbers 2 i (in `even`) and 2 i + 1 (in `odd`), i < 4, of two pieces' eight numbers: one of each in each pair.
template <uint bits, uint low, uint high, uint chunk, uint chunks>
static inline void tq_across(thread const TqPiece<low, high, chunk, chunks>& first,
                             thread const TqPiece<low, high, chunk, chunks>& second, uint eight,
                             threadgroup const uint* table, uint lane, thread uint (&even)[4], thread uint (&odd)[4]) {
  if (bits == 16) {
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint a = first.low_words[4 * eight + i], b = second.low_words[4 * eight + i];
      even[i] = tq_lower(a, b);
      odd[i] = tq_upper(a, b);
    }
  } else {
    const TqEight a = tq_codes_of<bits>(first, eight), b = tq_codes_of<bits>(second, eight);
    const uint even_codes = tq_nibbles(a.first, b.first << 4), odd_codes = tq_nibbles(a.second, b.first);
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      if (bits <= 4) {
        even[i] = tq_look_up(table, lane, even_codes, i);
        odd[i] = tq_look_up(table, lane, odd_codes, i);
      } else {
        even[i] = tq_lower(tq_level_of<low>(table, lane, a, 2 * i), tq_level_of<low>(table, lane, b, 2 * i));
        odd[i] = tq_lower(tq_level_of<low>(table, lane, a, 2 * i + 1), tq_level_of<low>(table, lane, b, 2 * i + 1));
      }
    }
  }
}
