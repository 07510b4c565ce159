// The CUDA backend: launches what the plans say.
#include "../backend.h"

#include "../gpu/plan.h"
#include "driver.h"
#include "launch.h"

namespace tqattn::cuda {
namespace {

using at::Tensor;

constexpr uint32_t kQueries = 2;
constexpr uint32_t kThreadgroupsOfMultiprocessor = 8;  // fewer leave it waiting for memory

gpu::Device describe(c10::Device device) {
  const DeviceProperties& its = properties(device.index());
  gpu::Device described{kQueries, kThreadgroupsOfMultiprocessor * its.processors};
  described.matrix_processors = its.version >= 80 ? its.processors : 0;
  described.matrix_bytes = its.shared_bytes;
  described.has_clusters = its.version >= 90;
  described.encode_simdgroups = TQ_ENCODE_THREADS / 32;
  described.encode_threadgroups = its.processors;
  return described;
}

class CudaBackend final : public Backend {
 public:
  void rotate(const Tensor& x, bool inverse, const Tensor& out) const override {
    launch(gpu::plan_rotate(x, inverse, out), x.device());
  }
  void encode(const EncodeCall& call) const override {
    const c10::Device device = call.inputs.front().x.device();
    launch(gpu::plan_encode(call, describe(device)), device);
  }
  void attend(const AttendCall& call) const override {
    const c10::Device device = call.q.device();
    launch(gpu::plan_attend(call, describe(device)), device);
  }
  void decode(const DecodeCall& call) const override { launch(gpu::plan_decode(call), call.outs.front().device()); }
  void reduce(const ReduceCall& call) const override { launch(gpu::plan_reduce(call), call.out.device()); }
};

const bool registered = [] {
  static const CudaBackend backend;
  register_backend(c10::DeviceType::CUDA, &backend);
  return true;
}();

}  // namespace
}  // namespace tqattn::cuda
