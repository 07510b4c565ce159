// What every operator checks before it runs, the same on every backend and under fake tensors.
//
// Sizes are SymInts, so that torch.compile can trace with symbolic shapes; on real tensors they are plain numbers.
// Each message says what is wrong, what was expected and what was given.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <utility>

#include "backend.h"

namespace tqattn {

// One side (K or V) of a cache, as the operators receive it.
struct SideArgs {
  const at::Tensor& codes;
  const OptionalTensor& norms;
  const OptionalTensor& means;
  const OptionalTensor& tail;
  std::string_view format;
};

struct StoreArgs {
  SideArgs k;
  SideArgs v;
};

// Features of attention that both attend and decode_step_ take.
struct AttendOptions {
  std::optional<double> scale;
  double softcap;
  c10::SymInt window;
  const OptionalTensor& sinks;
  const OptionalTensor& mask;
  const OptionalTensor& starts;
  const OptionalTensor& lengths;
  bool causal;
};

// Arguments of the seed-shaped attention operators, as given.
struct SeedArgs {
  const char* op;    // name for messages
  const char* kind;  // of launch policy
  const at::Tensor& q;
  const at::Tensor& k;
  const OptionalTensor& k_norms;  // absent for F16 keys
  const at::Tensor& v;
  const OptionalTensor& v_norms;
  c10::SymInt kv_seq_len;
  double scale;
  int64_t codebook_bits;
  int64_t mask_type;
  c10::SymInt sliding_window;
  double softcap;
  c10::SymInt ring_start;
  double scale_factor_d512;
  bool fuse_fwht_pre;
  int64_t nwg;  // 0: the launch policy's
  int64_t nsg;
  const OptionalTensor& tmp;
};

void check_rotate(const at::Tensor& x);
void check_encode(const at::Tensor& k, const at::Tensor& v, const StoreArgs& stores, const c10::SymInt& position,
                  const c10::SymInt& coded, const c10::SymInt& coded_end, int64_t block_size, int64_t sink_length,
                  const OptionalTensor& starts, std::string_view encode);
void check_attend(const at::Tensor& q, const StoreArgs& stores, const c10::SymInt& start, const c10::SymInt& coded,
                  const c10::SymInt& length, int64_t block_size, int64_t sink_length, const AttendOptions& options);
void check_decode(const StoreArgs& stores, int64_t head_dim, const c10::SymInt& start, const c10::SymInt& coded,
                  const c10::SymInt& length, int64_t block_size, int64_t sink_length, const OptionalTensor& starts);

void check_seed_rotate(const char* op, const at::Tensor& x);
void check_seed_higher_bits(const char* op, int64_t codebook_bits);
void check_seed_quantize(const char* op, const at::Tensor& x, const at::Tensor& packed, const at::Tensor& norms,
                         const c10::SymInt& write_pos, int64_t codebook_bits, bool is_sliding,
                         double scale_factor_d512);
// Returns the launch: nwg and nsg as given, or the policy's.
std::pair<int64_t, int64_t> check_seed_attention(const SeedArgs& args);
void check_seed_reduce(const char* op, const at::Tensor& tmp, const c10::SymInt& nrows, int64_t head_dim, int64_t nwg);

}  // namespace tqattn
