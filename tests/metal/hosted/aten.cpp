// An mps device for a torch that was built without one: allocator, guard, hooks, the kernels that no fallback can stand
// in for, and the CPU's for everything else.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "double.h"

namespace metal_double {

void fail(const std::string& message) { TORCH_CHECK(false, "Metal double: ", message); }

namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using c10::Device;
using c10::Stream;

const Device kDevice(c10::kMPS, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

// As on a Mac, a storage's data is the buffer object and no address.
struct BufferAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* buffer = bytes > 0 ? new_buffer(bytes) : nullptr;
    return {buffer, buffer, &release_buffer, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_buffer; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    synchronize();
    memcpy(buffer_contents(to), buffer_contents(const_cast<void*>(from)), bytes);
  }
};

BufferAllocator allocator;
const int allocator_registration = (c10::SetAllocator(c10::kMPS, &allocator), 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kMPS; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  // There is one stream, and whoever asks for an event has all that came before it.
  void record(void** event, const Stream&, c10::DeviceIndex, c10::EventFlag) const override { *event = &allocator; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    synchronize();
    return true;
  }
  void synchronizeEvent(void*) const override { synchronize(); }
};

struct Hooks final : at::MPSHooksInterface {
  template <typename... Unused>  // torch 2.11 passes an argument
  explicit Hooks(Unused...) {}
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getMPSDeviceAllocator() const override { return &allocator; }
  void deviceSynchronize() const override { synchronize(); }
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return buffer_bytes(); }
};

ScalarType checked_type(std::optional<ScalarType> type) {
  const ScalarType result = type.value_or(c10::get_default_dtype_as_scalartype());
  TORCH_CHECK_TYPE(result != at::kDouble && result != at::kComplexDouble, "mps tensors cannot be float64");
  return result;
}

Tensor empty(IntArrayRef sizes, std::optional<ScalarType> type, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator, kKeys, checked_type(type), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> type, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, kKeys, checked_type(type));
}

// A CPU tensor of the same bytes.
Tensor on_cpu(const Tensor& x) {
  if (!x.is_mps()) return x;
  const at::TensorOptions options = x.options().device(at::kCPU);
  void* buffer = x.storage().mutable_data();
  if (buffer == nullptr) return at::empty(x.sizes(), options);
  char* data = buffer_contents(buffer) + x.storage_offset() * x.element_size();
  const Tensor view = at::from_blob(data, x.sizes(), x.strides(), options);
  return x.is_conj() ? view.conj() : view;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  synchronize();
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor result = to;
  return copy_(result, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  Tensor result = to;
  result.resize_(self.sizes());
  return copy_(result, self, false);
}

at::Scalar local_scalar(const Tensor& x) {
  synchronize();
  return on_cpu(x).item();
}

const Tensor& resize_(const Tensor& self, IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  if (self.sizes() == sizes) return self;  // strides stay too
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  c10::StorageImpl* storage = self.storage().unsafeGetStorageImpl();
  const size_t bytes = (self.numel() + self.storage_offset()) * self.element_size(), had = storage->nbytes();
  if (had >= bytes) return self;
  c10::DataPtr data = allocator.allocate(bytes);
  if (had > 0) allocator.copy_data(data.get(), storage->data(), had);
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(bytes);
  return self;
}

// torch's own chooses a kernel by a table that has no row for mps where torch is built without it.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
                 bool is_causal, std::optional<double> scale, bool enable_gqa) {
  std::optional<Tensor> added = mask;
  if (mask.has_value() && mask->scalar_type() == at::kBool) {
    added = at::zeros(mask->sizes(), q.options()).masked_fill(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, added, dropout, is_causal, {}, scale, enable_gqa));
}

// On the CPU, as what falls back; but PyTorch has a kernel for all devices, which raises an error.
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool is_transposed,
                   at::IntArrayRef output_padding, int64_t groups) {
  const std::optional<Tensor> cpu_bias = bias.has_value() ? std::optional(bias->cpu()) : std::nullopt;
  return at::convolution(x.cpu(), weight.cpu(), cpu_bias, stride, padding, dilation, is_transposed, output_padding,
                         groups)
      .to(x.device());
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("convolution_overrideable", convolution);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
}

// For tests: what the double saw and holds.
TORCH_LIBRARY(metal_double, m) {
  m.def("set_compiler(str command) -> ()", [](std::string_view command) { set_compiler(std::string(command)); });
  m.def("set_max_threads(int threads) -> ()", [](int64_t threads) { set_max_threads(threads); });
  m.def("pending() -> int", []() { return static_cast<int64_t>(pending()); });
  m.def("reset() -> ()", []() { reset(); });
  m.def("buffer_bytes() -> int", []() { return static_cast<int64_t>(buffer_bytes()); });
  m.def("live_objects(str name) -> int", [](std::string_view name) { return live_objects()[std::string(name)]; });
}

}  // namespace
}  // namespace metal_double

namespace at {
using metal_double::Guard;
using metal_double::Hooks;
C10_REGISTER_GUARD_IMPL(MPS, Guard)
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, Hooks)
}  // namespace at
