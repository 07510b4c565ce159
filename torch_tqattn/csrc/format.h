// The storage formats by name, from the generated table, and their sizes.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#include "../shaders/tables.h"

namespace tqattn {

struct StorageFormat {
  const char* name;
  int bits;       // of a code; 16 for f16
  int low_plane;  // bits of a code in the row's first plane
  int high_plane;

  bool is_coded() const { return bits < 16; }
  // Bytes of one row of codes; for f16, of one row of half-precision numbers.
  int64_t row_bytes(int64_t head_dim) const {
    const int64_t used = head_dim * low_plane / 8 + head_dim * high_plane / 8;
    return (used + TQ_ROW_ALIGNMENT - 1) / TQ_ROW_ALIGNMENT * TQ_ROW_ALIGNMENT;
  }
};

// Raises ValueError naming the choices if there is no such format.
const StorageFormat& find_format(std::string_view name);

// How an encoder chooses codes and norms: decoded groups keep their length (fast, best) or their scale (plain).
enum class Encode { kFast, kBest, kPlain };

// Raises ValueError naming the choices if there is none of that name.
Encode find_encode(std::string_view name);

bool is_supported_head_dim(int64_t head_dim);
std::string supported_head_dims();

// Dense rows are half precision: finite numbers stay finite, infinities and NaN stay what they are.
inline float saturate_to_half(float x) {
  return std::isinf(x) ? x : x > TQ_HALF_MAX ? TQ_HALF_MAX : x < -TQ_HALF_MAX ? -TQ_HALF_MAX : x;
}

inline int64_t norm_groups(int64_t head_dim) { return (head_dim + TQ_NORM_GROUP - 1) / TQ_NORM_GROUP; }

// Which levels the codes stand for: the format's integers times a scale, or the seed-shaped operators' exact ones.
struct Codebook {
  int bits;
  const float* levels;
  const float* thresholds;  // between neighbouring levels
  const int16_t* integers;  // null for exact levels
  float scale;              // a level is its integer times this
};

const Codebook& format_codebook(int bits);
const Codebook& exact_codebook(int bits);

}  // namespace tqattn
