#include "launch_policy.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace tqattn {
namespace {

// The variable's value, or 0 where it is unset, not a number, or out of range: then the policy decides.
int64_t read_override(const char* name, int64_t largest, bool power_of_two) {
  const char* text = std::getenv(name);
  if (text == nullptr) return 0;
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  const bool is_number = error == std::errc() && stop == end;
  const bool is_allowed = value >= 1 && value <= largest && !(power_of_two && (value & (value - 1)) != 0);
  return is_number && is_allowed ? value : 0;
}

struct Overrides {
  int64_t tq_nwg = read_override("TQATTN_TQ_NWG", 32, false);
  int64_t hybrid_nwg = read_override("TQATTN_HYBRID_NWG", 32, false);
  int64_t tq_nsg = read_override("TQATTN_TQ_NSG", 4, true);
};

}  // namespace

LaunchPolicy launch_policy(std::string_view kind, int64_t kv_seq_len) {
  static const Overrides overrides;
  // Past 512 positions 16 workgroups take several turns each, and 32 gain; past 1024, four simdgroups share a turn.
  const int64_t nwg_by_length = kv_seq_len > 512 ? 32 : 16;
  const int64_t nsg_by_length = kv_seq_len > 1024 ? 4 : 1;
  LaunchPolicy policy{};
  int64_t forced_nwg = overrides.tq_nwg;
  int64_t forced_nsg = overrides.tq_nsg;
  if (kind == "tq") {
    policy = {16, 1};
    forced_nsg = 0;  // the 4-bit kernel has one simdgroup
  } else if (kind == "tq_hb") {
    policy = {nwg_by_length, nsg_by_length};
  } else if (kind == "hybrid") {
    policy = {nwg_by_length, nsg_by_length};
    forced_nwg = overrides.hybrid_nwg;
  } else {
    TORCH_CHECK_VALUE(false, "unknown kernel kind '", kind, "'; choose one of tq, tq_hb, hybrid");
  }
  return {forced_nwg > 0 ? forced_nwg : policy.nwg, forced_nsg > 0 ? forced_nsg : policy.nsg};
}

int64_t cpu_splits(int64_t tasks, int64_t tiles, int64_t threads) {
  // Four tasks a thread even out their differences; a part of fewer than four tiles costs more to merge than it saves.
  const int64_t wanted = threads > 1 ? (4 * threads + tasks - 1) / std::max<int64_t>(tasks, 1) : 1;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles / 4, 1));
}

}  // namespace tqattn
