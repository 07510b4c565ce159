// The MPS backend: encodes what the plans say.
#include "../backend.h"

#include <ATen/mps/MPSDevice.h>

#include <algorithm>

#include "../gpu/plan.h"
#include "encode.h"

namespace tqattn::mps {
namespace {

using at::Tensor;

constexpr uint32_t kQueries = 2;             // two rows cost 1.5 times as much as one, four spill registers
constexpr uint32_t kThreadgroupsOfCore = 8;  // fewer leave a core waiting for memory

gpu::Device device() {
  static const uint32_t cores = at::mps::MPSDevice::getInstance()->getCoreCount();
  return {kQueries, kThreadgroupsOfCore * std::max(cores, 1u)};
}

class MpsBackend final : public Backend {
 public:
  void rotate(const Tensor& x, bool inverse, const Tensor& out) const override {
    mps::encode(gpu::plan_rotate(x, inverse, out));
  }
  void encode(const EncodeCall& call) const override { mps::encode(gpu::plan_encode(call, device())); }
  void attend(const AttendCall& call) const override { mps::encode(gpu::plan_attend(call, device())); }
  void decode(const DecodeCall& call) const override { mps::encode(gpu::plan_decode(call)); }
  void reduce(const ReduceCall& call) const override { mps::encode(gpu::plan_reduce(call)); }
};

const bool registered = [] {
  static const MpsBackend backend;
  register_backend(c10::DeviceType::MPS, &backend);
  return true;
}();

}  // namespace
}  // namespace tqattn::mps
