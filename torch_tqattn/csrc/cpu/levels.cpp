// The codebooks as tables of bytes.
#include <c10/util/Exception.h>

#include <cstring>

#include "kernels.h"

namespace tqattn::cpu {
namespace {

LevelTable make_table(const Codebook& codebook) {
  LevelTable table;
  // Integers have few digits: their lower bytes are zero and need no look-up. And they are symmetric.
  const bool has_integers = codebook.integers != nullptr;
  const int last = (1 << codebook.bits) - 1;
  for (int i = 0; has_integers && i <= last; ++i) {
    TORCH_INTERNAL_ASSERT(codebook.integers[i] == -codebook.integers[last - i]);
  }
  table.factor = has_integers ? codebook.scale : 1.0f;
  for (int i = 0; i < 256; ++i) {
    const int code = i % (1 << codebook.bits);
    const float level = has_integers ? codebook.integers[code] : codebook.levels[code];
    uint8_t bytes[4];
    std::memcpy(bytes, &level, 4);
    for (int b = 0; b < 4; ++b) table.bytes[b][i] = bytes[b];
    const int integer = has_integers ? codebook.integers[code] : 0, low = integer & 255;
    if (codebook.bits <= 5) {
      table.with_sign[0][i] = static_cast<uint8_t>(integer);
      table.without_sign[0][i] = static_cast<uint8_t>(integer + 128);
    } else {
      const int high = (integer - low) / 256;
      table.with_sign[0][i] = static_cast<uint8_t>(low - 128);
      table.with_sign[1][i] = static_cast<uint8_t>(high);
      table.without_sign[0][i] = static_cast<uint8_t>(low);
      table.without_sign[1][i] = static_cast<uint8_t>(high + 128);
    }
  }
  return table;
}

struct AllTables {
  LevelTable of_format[9];  // by bits
  LevelTable exact[9];
  AllTables() {
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      of_format[bits] = make_table(format_codebook(bits));
      if (bits >= 4) exact[bits] = make_table(exact_codebook(bits));
    }
  }
};

}  // namespace

const LevelTable& level_table(const Codebook& codebook) {
  static const AllTables all;
  return (codebook.integers != nullptr ? all.of_format : all.exact)[codebook.bits];
}

}  // namespace tqattn::cpu
