// Arguments that the host and every kernel share. Scalars of 4 bytes only, so that all compilers lay them out alike.
#pragma once

#ifndef __METAL_VERSION__
#include <cstdint>
#endif

// Positions are absolute: position p lives in slot p % slots of the coded store, or in the dense tail. The tail's first
// sink_length rows hold each sequence's first tokens for good: a sequence that starts at position s, after its padding,
// has p in row p - s. After them comes a ring for the newest tokens, where p is in row sink_length + p % tail_slots.
struct TqAttendParams {
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t q_len;
  uint32_t head_dim;
  uint32_t slots;        // rows of the coded store
  uint32_t tail_slots;   // rows of the dense tail's ring; unused without blocks
  uint32_t sink_length;  // rows of the dense tail before its ring
  uint32_t block_size;   // positions that share a mean; 0 without blocks
  uint32_t start;        // first position that may be seen
  uint32_t coded;        // first position that is in the dense tail's ring
  uint32_t length;       // positions seen so far: one past the newest
  uint32_t window;       // a query sees this many positions, its own included; 0 for all
  uint32_t causal;       // 1: query i is at position length - q_len + i and sees nothing newer
  uint32_t mask_batch;   // batch entries in the mask: 0 without a mask, 1, or all
  uint32_t mask_rows;    // query rows in the mask: 1 or q_len
  uint32_t splits;       // parts that the positions are cut into; their results are merged
  float scale;
  float softcap;  // 0: none
  // The rest is for GPU kernels.
  uint32_t batch;
  uint32_t has_starts;  // whether the kernel may read these arguments
  uint32_t has_lengths;
  uint32_t rotate_q;    // 0: q is rotated already
  float k_norm_factor;  // what a stored norm is multiplied with
  float v_norm_factor;
  // For attend_matrix.metal, which should not have to divide.
  uint32_t heads_per_kv;
  uint32_t query_tiles;  // of TQ_QUERIES query rows of a KV head
  uint32_t first_slot;   // the slot of position `start`
  uint32_t mean_ring;    // rows of means; 1 if there are none
  uint32_t block_shift;  // blocks have 2 to this power positions; 0 for other sizes
  uint32_t dense_shift;  // a tile of dense rows counts as 2 to this power tiles of codes
  float part;            // 1 / (splits * simdgroups of a threadgroup)
};

// Threads of a threadgroup that codes, at most.
#define TQ_ENCODE_THREADS 512

// Positions of a block that are added up one after the other. Then pairs of these sums are added up, and these one
// after the other: so a block's mean is the same, bit by bit, whichever kernel finds it and however its tokens came.
#define TQ_RUN 8u

// Rows of a block that a threadgroup of encode_block.metal codes, one a simdgroup: two runs. Another simdgroup keeps
// the new token.
#define TQ_PIECE_ROWS (2 * TQ_RUN)
#define TQ_PIECE_THREADS (32 * (TQ_PIECE_ROWS + 1))

// Numbers of a codebook in its threadgroup memory: thresholds, then levels, of codes of up to 8 bits.
#define TQ_BOOK_FLOATS 512

// Threads of a threadgroup of attend_matrix.metal, by what registers they need.
#define TQ_MATRIX_THREADS(head_dim, queries) ((head_dim) <= 128 && (queries) == 8 ? 512 : 256)

// Threadgroups of attend_matrix.metal whose parts are merged where they are, at most.
#define TQ_MOST_OF_CLUSTER 8

// Entries of attend_matrix.metal's tables of the levels of codes of so many bits. An entry takes 256 bytes, of K and V.
#define TQ_TABLE_ENTRIES(bits) ((bits) == 16 ? 0u : (bits) <= 4 ? 256u : 1u << (bits) % 16)

// Bytes from one row of K's, and of V's, to the next where attend_matrix.metal has a tile of them in threadgroup
// memory: lanes read from different banks.
#define TQ_STAGED_K_ROW(bytes) ((bytes) + ((bytes) % 128 == 0 ? 16u : 0u))
#define TQ_STAGED_V_ROW(bytes) ((bytes) + ((bytes) % 32 == 0 ? 16u : 0u))

// How attention ends: in reduce.metal, or in attend_matrix.metal where its threadgroups are one cluster.
struct TqFinishParams {
  uint32_t is_finished;  // 1: attend_matrix.metal leaves results, not parts
  uint32_t has_sinks;
  uint32_t has_lse;
  uint32_t undo_rotation;
};

// Merging the parts of an attention call.
struct TqReduceParams {
  uint32_t rows;  // batch * num_heads * q_len
  uint32_t splits;
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t q_len;
};

// Storing new tokens: those of positions position..position + tokens; coded_begin..coded_end are coded.
struct TqEncodeParams {
  uint32_t num_kv_heads;
  uint32_t tokens;
  uint32_t slots;
  uint32_t tail_slots;
  uint32_t sink_length;
  uint32_t block_size;
  uint32_t position;
  uint32_t coded_begin;
  uint32_t coded_end;
  uint32_t unit;    // positions that are coded together: a block, if there are blocks
  uint32_t pieces;  // threadgroups that a unit is coded by
  uint32_t kept;    // tokens that a threadgroup puts into the tail
  uint32_t encode;  // csrc/format.h's Encode
  uint32_t has_starts;
  float k_norm_factor;
  float v_norm_factor;
  // For encode_block.metal, which should not have to divide.
  uint32_t first_row;   // of the tail's ring: that of position coded_begin
  uint32_t first_slot;  // the slot of position coded_begin
  uint32_t mean_ring;   // rows of means
  uint32_t first_mean;  // the block's
  uint32_t keeper;      // which of the pieces keeps the new token
};

// Decoding positions start..length.
struct TqDecodeParams {
  uint32_t num_kv_heads;
  uint32_t slots;
  uint32_t tail_slots;
  uint32_t sink_length;
  uint32_t block_size;
  uint32_t start;
  uint32_t coded;
  uint32_t length;
  uint32_t has_starts;
  uint32_t undo_rotation;
};
