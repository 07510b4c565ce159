// The operators' schemas; docs/operators.md describes them, operators.cpp implements them.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "launch_policy.h"

#define TQ_STORES                                      \
  "Tensor k_codes, Tensor? k_norms, Tensor? k_means, " \
  "Tensor? k_tail, Tensor v_codes, Tensor? v_norms, "  \
  "Tensor? v_means, Tensor? v_tail, str k_format, str v_format"
#define TQ_MUTABLE_STORES                                          \
  "Tensor(a!) k_codes, Tensor(b!)? k_norms, Tensor(c!)? k_means, " \
  "Tensor(d!)? k_tail, Tensor(e!) v_codes, Tensor(f!)? v_norms, "  \
  "Tensor(g!)? v_means, Tensor(h!)? v_tail, str k_format, str v_format"
#define TQ_SEED_MASK                                                                   \
  "int mask_type=0, SymInt sliding_window=0, float softcap=0.0, SymInt ring_start=0, " \
  "float scale_factor_d512=1.0"
#define TQ_SEED_HIGHER_BITS                                          \
  "SymInt kv_seq_len, float scale, int codebook_bits, " TQ_SEED_MASK \
  ", bool fuse_fwht_pre=False, int nwg=0, int nsg=0, Tensor(a!)? tmp=None) -> Tensor"

TORCH_LIBRARY(tqattn, m) {
  // Each has a fake kernel and passes torch.library.opcheck.
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("rotate(Tensor x, bool inverse=False) -> Tensor", tags);
  m.def("encode_kv_(Tensor k, Tensor v, " TQ_MUTABLE_STORES
        ", SymInt position, SymInt coded, SymInt coded_end, int block_size=0, int sink_length=0, Tensor? starts=None, "
        "str encode=\"fast\") -> ()",
        tags);
  m.def(
      "attend(Tensor q, " TQ_STORES
      ", SymInt start, SymInt coded, SymInt length, int block_size=0, int sink_length=0, float? scale=None, float softcap=0.0, "
      "SymInt window=0, Tensor? sinks=None, Tensor? mask=None, Tensor? starts=None, Tensor? lengths=None, "
      "bool causal=True) -> (Tensor, Tensor)",
      tags);
  m.def(
      "decode_kv(" TQ_STORES
      ", int head_dim, SymInt start, SymInt coded, SymInt length, int block_size=0, int sink_length=0, Tensor? starts=None, "
      "bool rotated=False) -> (Tensor, Tensor)",
      tags);
  m.def(
      "decode_step_(Tensor q, Tensor k, Tensor v, " TQ_MUTABLE_STORES
      ", SymInt start, SymInt position, SymInt coded, SymInt coded_end, int block_size=0, int sink_length=0, str encode=\"fast\", "
      "float? scale=None, float softcap=0.0, SymInt window=0, Tensor? sinks=None, Tensor? mask=None, "
      "Tensor? starts=None) -> (Tensor, Tensor)",
      tags);

  // Seed-shaped: the arguments, checks and policies of the kernels that the package started from.
  m.def("fwht_sign_premult(Tensor x) -> Tensor", tags);
  m.def("fwht_sign_undo(Tensor x) -> Tensor", tags);
  m.def(
      "hadamard_quantize_kv(Tensor x, Tensor(a!) packed, Tensor(b!) norms, SymInt write_pos, "
      "bool is_sliding=False, float scale_factor_d512=1.0) -> ()",
      tags);
  m.def(
      "hadamard_quantize_kv_hb(Tensor x, Tensor(a!) packed, Tensor(b!) norms, SymInt write_pos, "
      "int codebook_bits, bool is_sliding=False, float scale_factor_d512=1.0) -> ()",
      tags);
  m.def(
      "flash_attn_vec_tq(Tensor q, Tensor k_packed, Tensor k_norms, Tensor v_packed, Tensor v_norms, "
      "SymInt kv_seq_len, float scale, " TQ_SEED_MASK ", int nwg=0, Tensor(a!)? tmp=None) -> Tensor",
      tags);
  m.def(
      "flash_attn_vec_tq_hb(Tensor q, Tensor k_packed, Tensor k_norms, Tensor v_packed, Tensor v_norms, " TQ_SEED_HIGHER_BITS,
      tags);
  m.def(
      "flash_attn_vec_tq_hb_with_fused_undo(Tensor q, Tensor k_packed, Tensor k_norms, Tensor v_packed, "
      "Tensor v_norms, " TQ_SEED_HIGHER_BITS,
      tags);
  m.def("flash_attn_vec_hybrid(Tensor q, Tensor k_f16, Tensor v_packed, Tensor? v_norms, " TQ_SEED_HIGHER_BITS, tags);
  m.def("flash_attn_vec_reduce(Tensor tmp, SymInt nrows, int head_dim, int nwg) -> Tensor", tags);
  m.def("flash_attn_vec_reduce_tq_hb_undo(Tensor tmp, SymInt nrows, int head_dim, int nwg) -> Tensor", tags);

  m.def(
      "launch_policy(str kind, int kv_seq_len) -> (int, int)",
      [](std::string_view kind, int64_t kv_seq_len) {
        const tqattn::LaunchPolicy policy = tqattn::launch_policy(kind, kv_seq_len);
        return std::make_tuple(policy.nwg, policy.nsg);
      },
      tags);
}
