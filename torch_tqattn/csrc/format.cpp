#include "format.h"

#include <c10/util/Exception.h>

#include <array>

#include "../shaders/guess.h"

namespace tqattn {
namespace {

constexpr StorageFormat kFormats[] = {{"f16", 16, 16, 0},
#define X(name, bits, low, high) {name, bits, low, high},
                                      TQ_CODED_FORMATS(X)
#undef X
};

constexpr int64_t kHeadDims[] = {
#define X(head_dim) head_dim,
    TQ_HEAD_DIMS(X)
#undef X
};

// Whether every number between two thresholds is guessed to be at one of them.
template <int kBits>
constexpr bool guesses_are_near(const float* thresholds) {
  const int last = (1 << kBits) - 2;
  for (int t = 0; t <= last; ++t) {
    const float wanted = static_cast<float>(t - last / 2);
    for (int step = 0; step < 8; ++step) {
      const float next = thresholds[t < last ? t + 1 : t];
      const float off = tq_guess<kBits>(thresholds[t] + (next - thresholds[t]) * step / 8) - wanted;
      if (off < -0.25f || off > (step == 0 ? 0.25f : 1.25f)) return false;
    }
  }
  return true;
}

static_assert(guesses_are_near<2>(kThresholds2) && guesses_are_near<3>(kThresholds3));
static_assert(guesses_are_near<4>(kThresholds4) && guesses_are_near<4>(kExactThresholds4));
static_assert(guesses_are_near<5>(kThresholds5) && guesses_are_near<5>(kExactThresholds5));
static_assert(guesses_are_near<6>(kThresholds6) && guesses_are_near<6>(kExactThresholds6));
static_assert(guesses_are_near<8>(kThresholds8) && guesses_are_near<8>(kExactThresholds8));

template <int kBits>
const Codebook& make_codebook(const int16_t* integers, float scale, const float* thresholds) {
  static const std::array<float, 1 << kBits> levels = [&] {
    std::array<float, 1 << kBits> values{};
    for (int i = 0; i < (1 << kBits); ++i) values[i] = static_cast<float>(integers[i]) * scale;
    return values;
  }();
  static const Codebook codebook{kBits, levels.data(), thresholds, integers, scale};
  return codebook;
}

}  // namespace

const StorageFormat& find_format(std::string_view name) {
  std::string choices;
  for (const StorageFormat& format : kFormats) {
    if (name == format.name) return format;
    choices += (choices.empty() ? "" : ", ") + std::string(format.name);
  }
  TORCH_CHECK_VALUE(false, "unknown storage format '", name, "'; choose one of ", choices);
}

Encode find_encode(std::string_view name) {
  if (name == "fast") return Encode::kFast;
  if (name == "best") return Encode::kBest;
  if (name == "plain") return Encode::kPlain;
  TORCH_CHECK_VALUE(false, "unknown encode '", name,
                    "'; choose fast or best (decoded groups keep their norm) or plain (they keep their scale)");
}

bool is_supported_head_dim(int64_t head_dim) {
  for (int64_t supported : kHeadDims) {
    if (head_dim == supported) return true;
  }
  return false;
}

std::string supported_head_dims() {
  std::string choices;
  for (int64_t supported : kHeadDims) choices += (choices.empty() ? "" : ", ") + std::to_string(supported);
  return choices;
}

const Codebook& format_codebook(int bits) {
  switch (bits) {
#define CASE(b) \
  case b:       \
    return make_codebook<b>(kLevels##b, kLevelScale##b, kThresholds##b)
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
    CASE(8);
#undef CASE
  }
  TORCH_INTERNAL_ASSERT(false, "no codebook of ", bits, " bits");
}

const Codebook& exact_codebook(int bits) {
  switch (bits) {
#define CASE(b)                                                                             \
  case b: {                                                                                 \
    static const Codebook codebook{b, kExactLevels##b, kExactThresholds##b, nullptr, 1.0f}; \
    return codebook;                                                                        \
  }
    CASE(4)
    CASE(5)
    CASE(6)
    CASE(8)
#undef CASE
  }
  TORCH_INTERNAL_ASSERT(false, "no exact codebook of ", bits, " bits");
}

}  // namespace tqattn
