// The operators have no gradient. Training through one must fail loudly, not silently stop the gradient.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace {

void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  if (at::GradMode::is_enabled()) {
    for (size_t i = 0; i < count; ++i) {
      const c10::IValue& value = (*stack)[stack->size() - count + i];
      TORCH_CHECK(!value.isTensor() || !value.toTensor().defined() || !value.toTensor().requires_grad(), schema.name(),
                  " has no gradient, but its argument ", schema.arguments()[i].name(),
                  " requires one; call it under torch.no_grad() or detach the argument");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(tqattn, Autograd, m) {
  for (const char* name : {"rotate", "encode_kv_", "attend", "decode_kv", "decode_step_", "fwht_sign_premult",
                           "fwht_sign_undo", "hadamard_quantize_kv", "hadamard_quantize_kv_hb", "flash_attn_vec_tq",
                           "flash_attn_vec_tq_hb", "flash_attn_vec_tq_hb_with_fused_undo", "flash_attn_vec_hybrid",
                           "flash_attn_vec_reduce", "flash_attn_vec_reduce_tq_hb_undo"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
  }
}
