// How the work of a decode step is split. Plain values, computed the same on every platform.
#pragma once

#include <cstdint>
#include <string_view>

namespace tqattn {

// Workgroups per head and simdgroups per workgroup of the seed-shaped attention kernels.
struct LaunchPolicy {
  int64_t nwg;
  int64_t nsg;
};

// kind: "tq" (4 bits), "tq_hb" (5, 6, 8 bits) or "hybrid" (F16 keys). The environment variables TQATTN_TQ_NWG (tq and
// tq_hb) and TQATTN_HYBRID_NWG, 1..32, and TQATTN_TQ_NSG, one of 1, 2, 4, override the policy; they are read once.
LaunchPolicy launch_policy(std::string_view kind, int64_t kv_seq_len);

// Parts that the positions of one task are cut into so that `threads` processors have enough tasks.
int64_t cpu_splits(int64_t tasks, int64_t tiles, int64_t threads);

}  // namespace tqattn
