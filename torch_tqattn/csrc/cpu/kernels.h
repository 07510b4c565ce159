// The CPU kernels' interface: one table of functions for each instruction set, chosen once at run time.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#include "../../shaders/params.h"
#include "../format.h"

namespace tqattn::cpu {

// A codebook for look-ups of bytes: byte b of the level of code c, as a little-endian float32, is bytes[b][c]. The
// codebook is repeated to fill the table.
struct LevelTable {
  alignas(64) uint8_t bytes[4][256];
  // Levels that are integers, as digits for products of bytes with signs and without. Of 8 bits: digit 0 is the
  // integer, or the integer plus 128. Of 16 bits: digits 0 and 1 are those of the integer minus 128, or plus 2^15.
  alignas(64) uint8_t with_sign[2][256];
  uint8_t without_sign[2][256];
  float factor;  // what a level in the table is to be multiplied with
};

const LevelTable& level_table(const Codebook& codebook);

// One head of one side of a cache.
struct HeadStore {
  uint8_t* codes;  // rows of row_bytes; for f16, of half-precision numbers
  float* norms;
  c10::Half* means;  // null without block means
  c10::Half* tail;   // null without a dense tail
  int64_t first;     // position of its first token: what is before is padding
  const StorageFormat* format;
  const Codebook* codebook;  // null for f16
  const LevelTable* levels;  // likewise
  int64_t row_bytes;
  float norm_factor;  // what a stored norm is multiplied with
};

enum class InputType { kFloat, kHalf, kBFloat16 };

// New tokens of one KV head of one side.
struct EncodeTask {
  HeadStore store;
  const void* x;  // the row of `position`; each row's numbers lie together
  InputType type;
  int64_t stride;    // numbers from one row to the next
  int64_t position;  // of the first new token; those before are in the tail
  int64_t end;       // one past the last new token
  int64_t head_dim;
  int64_t slots;
  int64_t tail_slots;
  int64_t sink_length;
  int64_t block_size;
  Encode encode;
};

constexpr int kMaxDigits = 3;

// Queries that share a KV head, over one part of its positions.
struct AttendTask {
  const TqAttendParams* params;
  HeadStore k;
  HeadStore v;
  const float* q;  // [rows, head_dim], rotated and scaled
  int64_t rows;
  int digits;     // of 8 bits, that products in integers keep of queries and weights: 2 or kMaxDigits
  int64_t begin;  // positions of this part
  int64_t end;
  const int64_t* row_begin;  // [rows] positions that each row may see
  const int64_t* row_end;
  const bool* const* row_mask;  // [rows] masks of positions from params->start on; null without a mask
  float* out;                   // [rows, head_dim], stride out_stride: sums of weighted values, not normalised
  float* sums;                  // [rows, 2], stride sums_stride: sum of weights, maximum of logits
  int64_t out_stride;
  int64_t sums_stride;
};

constexpr int64_t kMaxTaskRows = 32;  // rows that share one pass over the positions

struct Kernels {
  const char* name;
  // [rows, head_dim] to [rows, head_dim], times `scale`; in and out may be the same.
  void (*rotate)(const float* in, float* out, int64_t rows, int64_t head_dim, bool inverse, float scale);
  // Codes positions begin..end: one block or, without blocks, any that do not wrap around the store. `gathered` has
  // room for a block's rows.
  void (*encode)(const EncodeTask& task, int64_t begin, int64_t end, c10::Half* gathered);
  // Keeps the new sink tokens, and positions begin..end in the tail's ring.
  void (*store_dense)(const EncodeTask& task, int64_t begin, int64_t end);
  // Positions begin..end, rotated, to out [end - begin, head_dim].
  void (*decode)(const HeadStore& store, const TqAttendParams& params, int64_t begin, int64_t end, float* out);
  void (*attend)(const AttendTask& task);
};

// The best table that this processor runs and ATEN_CPU_CAPABILITY allows.
const Kernels& kernels();

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace tqattn::cpu
