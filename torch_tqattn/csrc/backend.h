// What a device has to implement. operators.cpp checks the arguments and allocates the results, then makes one of these
// calls; everything in a call is valid, and all its tensors are on the backend's device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../shaders/params.h"
#include "format.h"

namespace tqattn {

using OptionalTensor = std::optional<at::Tensor>;

// One side (K or V) of a cache. codes [batch, kv_heads, slots, row], norms [batch, kv_heads, slots(, groups)], means
// [batch, kv_heads, blocks, head_dim], tail [batch, kv_heads, sink_length + tail_slots, head_dim]; all contiguous.
struct Side {
  at::Tensor codes;
  OptionalTensor norms;
  OptionalTensor means;
  OptionalTensor tail;
  const StorageFormat* format;
  const Codebook* codebook;  // null for f16
  float norm_factor = 1.0f;  // what a stored norm is multiplied with
};

// Rotate and store the tokens x [batch, kv_heads, tokens, head_dim] of each side, at positions position...; code the
// positions coded..coded_end, from the tail and from x; keep the rest in the tail. The first sink_length tokens of each
// sequence are kept in the tail's first rows alone: elsewhere they are stored as padding is.
struct EncodeCall {
  struct Input {
    at::Tensor x;
    Side side;
  };
  std::vector<Input> inputs;
  int64_t position;
  int64_t coded;
  int64_t coded_end;
  int64_t block_size;
  int64_t sink_length;
  OptionalTensor starts;
  Encode encode;
};

// out = attention of q [batch, heads, q_len, head_dim]; lse its log-sum-exp, if wanted.
struct AttendCall {
  at::Tensor q;
  Side k;
  Side v;
  TqAttendParams params;   // splits 0: the backend's choice
  int64_t simdgroups = 0;  // of a GPU's threadgroup; 0: the backend's choice
  OptionalTensor sinks;
  OptionalTensor mask;
  OptionalTensor starts;
  OptionalTensor lengths;
  bool rotate_q = true;       // false: q is already rotated
  bool undo_rotation = true;  // false: leave out rotated
  OptionalTensor partials;    // where to leave the parts' results, laid out as ReduceCall says
  at::Tensor out;
  OptionalTensor lse;
};

// Dense rows [batch, kv_heads, length - start, head_dim], float32, of positions start..length.
struct DecodeCall {
  std::vector<Side> sides;
  std::vector<at::Tensor> outs;
  TqAttendParams params;
  OptionalTensor starts;
  bool undo_rotation;
};

// Merge `splits` partial results a row: sums of weighted values [rows, splits, head_dim], then sum of weights and
// maximum of logits [rows, splits, 2], one after the other in `partials`. out [rows, head_dim].
struct ReduceCall {
  at::Tensor partials;
  int64_t rows;
  int64_t splits;
  int64_t head_dim;
  bool undo_rotation;
  at::Tensor out;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual void rotate(const at::Tensor& x, bool inverse, const at::Tensor& out) const = 0;
  virtual void encode(const EncodeCall& call) const = 0;
  virtual void attend(const AttendCall& call) const = 0;
  virtual void decode(const DecodeCall& call) const = 0;
  virtual void reduce(const ReduceCall& call) const = 0;
};

// `backend` must live as long as the process. Called while the library loads.
void register_backend(c10::DeviceType device, const Backend* backend);

// Null for a device without kernels, among them the meta device.
const Backend* find_backend(c10::DeviceType device);

}  // namespace tqattn
