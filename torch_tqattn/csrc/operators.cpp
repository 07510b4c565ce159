// The operators: check the arguments, allocate the results, and let the device's backend fill them.
//
// The same functions are the fake kernels: on the meta device there is no backend, and sizes may be symbolic.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "backend.h"
#include "checks.h"

namespace tqattn {
namespace {

using at::Tensor;
using c10::SymInt;

std::array<const Backend*, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& backends() {
  static std::array<const Backend*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> registered{};
  return registered;
}

int64_t concrete(const SymInt& value) { return value.guard_int(__FILE__, __LINE__); }

Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return at::empty_symint(sizes, like.options().dtype(type));
}

Side make_side(const SideArgs& args) {
  const StorageFormat& format = find_format(args.format);
  return {args.codes, args.norms, args.means,
          args.tail,  &format,    format.is_coded() ? &format_codebook(format.bits) : nullptr};
}

// The cache in memory, for any call that reads it.
TqAttendParams store_params(const Side& k, int64_t head_dim, int64_t start, int64_t coded, int64_t length,
                            int64_t block_size, int64_t sink_length) {
  TqAttendParams params{};
  params.num_kv_heads = static_cast<uint32_t>(k.codes.size(1));
  params.head_dim = static_cast<uint32_t>(head_dim);
  params.slots = static_cast<uint32_t>(k.codes.size(2));
  params.tail_slots = k.tail.has_value() ? static_cast<uint32_t>(k.tail->size(2) - sink_length) : 0;
  params.sink_length = static_cast<uint32_t>(sink_length);
  params.block_size = static_cast<uint32_t>(block_size);
  params.start = static_cast<uint32_t>(start);
  params.coded = static_cast<uint32_t>(coded);
  params.length = static_cast<uint32_t>(length);
  return params;
}

Tensor run_rotate(const Tensor& x, bool inverse) {
  Tensor out = empty(x.sym_sizes(), x, at::kFloat);
  const Backend* backend = find_backend(x.device().type());
  if (backend != nullptr && x.numel() > 0) backend->rotate(x, inverse, out);
  return out;
}

void run_encode(const Tensor& k, const Tensor& v, const StoreArgs& stores, const SymInt& position, const SymInt& coded,
                const SymInt& coded_end, int64_t block_size, int64_t sink_length, const OptionalTensor& starts,
                std::string_view encode) {
  const Backend* backend = find_backend(k.device().type());
  if (backend == nullptr || k.size(0) == 0 || k.size(1) == 0) return;  // without tokens, blocks may still be coded
  backend->encode({{{k, make_side(stores.k)}, {v, make_side(stores.v)}},
                   concrete(position),
                   concrete(coded),
                   concrete(coded_end),
                   block_size,
                   sink_length,
                   starts,
                   find_encode(encode)});
}

std::tuple<Tensor, Tensor> run_attend(const Tensor& q, const StoreArgs& stores, const SymInt& start,
                                      const SymInt& coded, const SymInt& length, int64_t block_size,
                                      int64_t sink_length, const AttendOptions& options) {
  Tensor out = empty(q.sym_sizes(), q, q.scalar_type());
  Tensor lse = empty(q.sym_sizes().slice(0, 3), q, at::kFloat);
  const Backend* backend = find_backend(q.device().type());
  if (backend != nullptr && q.numel() > 0) {
    AttendCall call;
    call.q = q;
    call.k = make_side(stores.k);
    call.v = make_side(stores.v);
    call.params =
        store_params(call.k, q.size(3), concrete(start), concrete(coded), concrete(length), block_size, sink_length);
    call.params.num_heads = static_cast<uint32_t>(q.size(1));
    call.params.q_len = static_cast<uint32_t>(q.size(2));
    call.params.window = static_cast<uint32_t>(std::min<int64_t>(concrete(options.window), call.params.length));
    call.params.causal = options.causal;
    call.params.mask_batch = options.mask.has_value() ? static_cast<uint32_t>(options.mask->size(0)) : 0;
    call.params.mask_rows = options.mask.has_value() ? static_cast<uint32_t>(options.mask->size(1)) : 0;
    call.params.scale = static_cast<float>(options.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3)))));
    call.params.softcap = static_cast<float>(options.softcap);
    call.sinks = options.sinks;
    call.mask = options.mask;
    call.starts = options.starts;
    call.lengths = options.lengths;
    call.out = out;
    call.lse = lse;
    backend->attend(call);
  }
  return {out, lse};
}

#define TQ_STORE_PARAMS                                                                                              \
  const Tensor &k_codes, const OptionalTensor &k_norms, const OptionalTensor &k_means, const OptionalTensor &k_tail, \
      const Tensor &v_codes, const OptionalTensor &v_norms, const OptionalTensor &v_means,                           \
      const OptionalTensor &v_tail, std::string_view k_format, std::string_view v_format
#define TQ_STORE_ARGS                                                                              \
  StoreArgs {                                                                                      \
    {k_codes, k_norms, k_means, k_tail, k_format}, { v_codes, v_norms, v_means, v_tail, v_format } \
  }

Tensor rotate(const Tensor& x, bool inverse) {
  check_rotate(x);
  return run_rotate(x, inverse);
}

void encode_kv_(const Tensor& k, const Tensor& v, TQ_STORE_PARAMS, SymInt position, SymInt coded, SymInt coded_end,
                int64_t block_size, int64_t sink_length, const OptionalTensor& starts, std::string_view encode) {
  const StoreArgs stores = TQ_STORE_ARGS;
  check_encode(k, v, stores, position, coded, coded_end, block_size, sink_length, starts, encode);
  run_encode(k, v, stores, position, coded, coded_end, block_size, sink_length, starts, encode);
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, TQ_STORE_PARAMS, SymInt start, SymInt coded, SymInt length,
                                  int64_t block_size, int64_t sink_length, std::optional<double> scale, double softcap,
                                  SymInt window, const OptionalTensor& sinks, const OptionalTensor& mask,
                                  const OptionalTensor& starts, const OptionalTensor& lengths, bool causal) {
  const StoreArgs stores = TQ_STORE_ARGS;
  const AttendOptions options{scale, softcap, window, sinks, mask, starts, lengths, causal};
  check_attend(q, stores, start, coded, length, block_size, sink_length, options);
  return run_attend(q, stores, start, coded, length, block_size, sink_length, options);
}

std::tuple<Tensor, Tensor> decode_kv(TQ_STORE_PARAMS, int64_t head_dim, SymInt start, SymInt coded, SymInt length,
                                     int64_t block_size, int64_t sink_length, const OptionalTensor& starts,
                                     bool rotated) {
  const StoreArgs stores = TQ_STORE_ARGS;
  check_decode(stores, head_dim, start, coded, length, block_size, sink_length, starts);
  const SymInt sizes[] = {k_codes.sym_size(0), k_codes.sym_size(1), length - start, head_dim};
  Tensor k = empty(sizes, k_codes, at::kFloat);
  Tensor v = empty(sizes, k_codes, at::kFloat);
  const Backend* backend = find_backend(k_codes.device().type());
  if (backend != nullptr && k.numel() > 0) {
    const Side k_side = make_side(stores.k);
    backend->decode(
        {{k_side, make_side(stores.v)},
         {k, v},
         store_params(k_side, head_dim, concrete(start), concrete(coded), concrete(length), block_size, sink_length),
         starts,
         !rotated});
  }
  return {k, v};
}

std::tuple<Tensor, Tensor> decode_step_(const Tensor& q, const Tensor& k, const Tensor& v, TQ_STORE_PARAMS,
                                        SymInt start, SymInt position, SymInt coded, SymInt coded_end,
                                        int64_t block_size, int64_t sink_length, std::string_view encode,
                                        std::optional<double> scale, double softcap, SymInt window,
                                        const OptionalTensor& sinks, const OptionalTensor& mask,
                                        const OptionalTensor& starts) {
  const StoreArgs stores = TQ_STORE_ARGS;
  const OptionalTensor no_lengths;
  const AttendOptions options{scale, softcap, window, sinks, mask, starts, no_lengths, true};
  const SymInt length = position + k.sym_size(2);
  // Everything is checked before anything is written.
  check_encode(k, v, stores, position, coded, coded_end, block_size, sink_length, starts, encode);
  check_attend(q, stores, start, coded_end, length, block_size, sink_length, options);
  run_encode(k, v, stores, position, coded, coded_end, block_size, sink_length, starts, encode);
  return run_attend(q, stores, start, coded_end, length, block_size, sink_length, options);
}

// Seed-shaped operators: one sequence, [kv_heads, capacity, row] stores, unrounded codebooks.

// 256: stored norms are lengths. 512: root mean squares of two groups, times the scale factor (0 stands for 1).
float seed_norm_factor(int64_t head_dim, double scale_factor_d512) {
  if (head_dim == 256) return 1.0f / 16.0f;
  return static_cast<float>(1.0 / (scale_factor_d512 < 1e-6 ? 1.0 : scale_factor_d512));
}

Side seed_side(const Tensor& store, const OptionalTensor& norms, int64_t codebook_bits, float norm_factor) {
  Side side;
  side.codes = store.unsqueeze(0);
  if (store.scalar_type() == at::kHalf) {
    side.format = &find_format("f16");
    side.codebook = nullptr;
    return side;
  }
  side.norms = norms->unsqueeze(0);
  side.format = &find_format(codebook_bits == 4 ? "tq4" : "tq8");
  side.codebook = &exact_codebook(static_cast<int>(codebook_bits));
  side.norm_factor = norm_factor;
  return side;
}

void seed_quantize(const char* op, const Tensor& x, const Tensor& packed, const Tensor& norms, const SymInt& write_pos,
                   int64_t codebook_bits, bool is_sliding, double scale_factor_d512) {
  check_seed_quantize(op, x, packed, norms, write_pos, codebook_bits, is_sliding, scale_factor_d512);
  const Backend* backend = find_backend(x.device().type());
  if (backend == nullptr || x.numel() == 0) return;
  const Tensor tokens = x.dim() == 3 ? x.unsqueeze(0) : x.unsqueeze(1).unsqueeze(0);
  const int64_t position = concrete(write_pos);
  const Side side = seed_side(packed, norms, codebook_bits, seed_norm_factor(x.size(-1), scale_factor_d512));
  backend->encode(
      {{{tokens, side}}, position, position, position + tokens.size(2), 0, 0, std::nullopt, Encode::kPlain});
}

Tensor seed_attention(const SeedArgs& args, bool undo_rotation) {
  const auto [nwg, nsg] = check_seed_attention(args);
  Tensor out = empty(args.q.sym_sizes(), args.q, at::kFloat);
  const Backend* backend = find_backend(args.q.device().type());
  if (backend == nullptr) return out;
  const int64_t head_dim = args.q.size(-1);
  const int64_t length = concrete(args.kv_seq_len), window = concrete(args.sliding_window);
  const int64_t ring_start = concrete(args.ring_start);
  const int64_t hidden = args.mask_type == 2 && window > 0 ? std::max<int64_t>(length - window, 0) : 0;
  const float norm_factor = seed_norm_factor(head_dim, args.scale_factor_d512);
  AttendCall call;
  call.q = args.q.reshape({1, -1, 1, head_dim});
  call.k = seed_side(args.k, args.k_norms, args.codebook_bits, norm_factor);
  call.v = seed_side(args.v, args.v_norms, args.codebook_bits, norm_factor);
  // The oldest position is in slot ring_start: counting positions from there makes slots what they are elsewhere.
  call.params = store_params(call.k, head_dim, ring_start + hidden, ring_start + length, ring_start + length, 0, 0);
  call.params.num_heads = static_cast<uint32_t>(args.q.size(0));
  call.params.q_len = 1;
  call.params.splits = static_cast<uint32_t>(nwg);
  call.simdgroups = nsg;
  call.params.scale = static_cast<float>(args.scale);
  call.params.softcap = static_cast<float>(args.softcap);
  call.rotate_q = args.fuse_fwht_pre;
  call.undo_rotation = undo_rotation;
  call.partials = args.tmp;
  call.out = out.view({1, -1, 1, head_dim});
  backend->attend(call);
  return out;
}

Tensor seed_rotate(const char* op, const Tensor& x, bool inverse) {
  check_seed_rotate(op, x);
  return run_rotate(x, inverse);
}

Tensor seed_reduce(const char* op, const Tensor& tmp, const SymInt& nrows, int64_t head_dim, int64_t nwg,
                   bool undo_rotation) {
  check_seed_reduce(op, tmp, nrows, head_dim, nwg);
  const SymInt sizes[] = {nrows, head_dim};
  Tensor out = empty(sizes, tmp, at::kFloat);
  const Backend* backend = find_backend(tmp.device().type());
  if (backend != nullptr && out.numel() > 0) {
    backend->reduce({tmp, concrete(nrows), nwg, head_dim, undo_rotation, out});
  }
  return out;
}

Tensor fwht_sign_premult(const Tensor& x) { return seed_rotate("fwht_sign_premult", x, false); }

Tensor fwht_sign_undo(const Tensor& x) { return seed_rotate("fwht_sign_undo", x, true); }

void hadamard_quantize_kv(const Tensor& x, const Tensor& packed, const Tensor& norms, SymInt write_pos, bool is_sliding,
                          double scale_factor_d512) {
  seed_quantize("hadamard_quantize_kv", x, packed, norms, write_pos, 4, is_sliding, scale_factor_d512);
}

void hadamard_quantize_kv_hb(const Tensor& x, const Tensor& packed, const Tensor& norms, SymInt write_pos,
                             int64_t codebook_bits, bool is_sliding, double scale_factor_d512) {
  check_seed_higher_bits("hadamard_quantize_kv_hb", codebook_bits);
  seed_quantize("hadamard_quantize_kv_hb", x, packed, norms, write_pos, codebook_bits, is_sliding, scale_factor_d512);
}

Tensor flash_attn_vec_tq(const Tensor& q, const Tensor& k_packed, const Tensor& k_norms, const Tensor& v_packed,
                         const Tensor& v_norms, SymInt kv_seq_len, double scale, int64_t mask_type,
                         SymInt sliding_window, double softcap, SymInt ring_start, double scale_factor_d512,
                         int64_t nwg, const OptionalTensor& tmp) {
  return seed_attention({"flash_attn_vec_tq", "tq", q, k_packed, k_norms, v_packed, v_norms, kv_seq_len, scale, 4,
                         mask_type, sliding_window, softcap, ring_start, scale_factor_d512, false, nwg, 0, tmp},
                        false);
}

#define TQ_HIGHER_BITS_PARAMS                                                                                       \
  SymInt kv_seq_len, double scale, int64_t codebook_bits, int64_t mask_type, SymInt sliding_window, double softcap, \
      SymInt ring_start, double scale_factor_d512, bool fuse_fwht_pre, int64_t nwg, int64_t nsg,                    \
      const OptionalTensor &tmp
#define TQ_HIGHER_BITS_ARGS                                                                                           \
  kv_seq_len, scale, codebook_bits, mask_type, sliding_window, softcap, ring_start, scale_factor_d512, fuse_fwht_pre, \
      nwg, nsg, tmp

Tensor flash_attn_vec_tq_hb(const Tensor& q, const Tensor& k_packed, const Tensor& k_norms, const Tensor& v_packed,
                            const Tensor& v_norms, TQ_HIGHER_BITS_PARAMS) {
  return seed_attention({"flash_attn_vec_tq_hb", "tq_hb", q, k_packed, k_norms, v_packed, v_norms, TQ_HIGHER_BITS_ARGS},
                        false);
}

Tensor flash_attn_vec_tq_hb_with_fused_undo(const Tensor& q, const Tensor& k_packed, const Tensor& k_norms,
                                            const Tensor& v_packed, const Tensor& v_norms, TQ_HIGHER_BITS_PARAMS) {
  return seed_attention({"flash_attn_vec_tq_hb_with_fused_undo", "tq_hb", q, k_packed, k_norms, v_packed, v_norms,
                         TQ_HIGHER_BITS_ARGS},
                        true);
}

Tensor flash_attn_vec_hybrid(const Tensor& q, const Tensor& k_f16, const Tensor& v_packed,
                             const OptionalTensor& v_norms, TQ_HIGHER_BITS_PARAMS) {
  const OptionalTensor no_norms;
  return seed_attention({"flash_attn_vec_hybrid", "hybrid", q, k_f16, no_norms, v_packed, v_norms, TQ_HIGHER_BITS_ARGS},
                        false);
}

Tensor flash_attn_vec_reduce(const Tensor& tmp, SymInt nrows, int64_t head_dim, int64_t nwg) {
  return seed_reduce("flash_attn_vec_reduce", tmp, nrows, head_dim, nwg, false);
}

Tensor flash_attn_vec_reduce_tq_hb_undo(const Tensor& tmp, SymInt nrows, int64_t head_dim, int64_t nwg) {
  return seed_reduce("flash_attn_vec_reduce_tq_hb_undo", tmp, nrows, head_dim, nwg, true);
}

void implement(torch::Library& m) {
  m.impl("rotate", &rotate);
  m.impl("encode_kv_", &encode_kv_);
  m.impl("attend", &attend);
  m.impl("decode_kv", &decode_kv);
  m.impl("decode_step_", &decode_step_);
  m.impl("fwht_sign_premult", &fwht_sign_premult);
  m.impl("fwht_sign_undo", &fwht_sign_undo);
  m.impl("hadamard_quantize_kv", &hadamard_quantize_kv);
  m.impl("hadamard_quantize_kv_hb", &hadamard_quantize_kv_hb);
  m.impl("flash_attn_vec_tq", &flash_attn_vec_tq);
  m.impl("flash_attn_vec_tq_hb", &flash_attn_vec_tq_hb);
  m.impl("flash_attn_vec_tq_hb_with_fused_undo", &flash_attn_vec_tq_hb_with_fused_undo);
  m.impl("flash_attn_vec_hybrid", &flash_attn_vec_hybrid);
  m.impl("flash_attn_vec_reduce", &flash_attn_vec_reduce);
  m.impl("flash_attn_vec_reduce_tq_hb_undo", &flash_attn_vec_reduce_tq_hb_undo);
}

}  // namespace

void register_backend(c10::DeviceType device, const Backend* backend) {
  backends()[static_cast<size_t>(device)] = backend;
}

const Backend* find_backend(c10::DeviceType device) { return backends()[static_cast<size_t>(device)]; }

}  // namespace tqattn

TORCH_LIBRARY_IMPL(tqattn, Meta, m) { tqattn::implement(m); }
TORCH_LIBRARY_IMPL(tqattn, CPU, m) { tqattn::implement(m); }
#ifdef TQATTN_MPS
TORCH_LIBRARY_IMPL(tqattn, MPS, m) { tqattn::implement(m); }
#endif
#ifdef TQATTN_CUDA
TORCH_LIBRARY_IMPL(tqattn, CUDA, m) { tqattn::implement(m); }
#endif
