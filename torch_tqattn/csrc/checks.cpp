#include "checks.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

#include "launch_policy.h"

namespace tqattn {
namespace {

using at::Tensor;
using c10::SymInt;

constexpr int64_t kMaxPosition = (int64_t{1} << 31) - 1;  // kernels count positions in 32 bits

bool is_input_type(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

void check_input(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(is_input_type(x.scalar_type()), name, " must be float32, float16 or bfloat16, got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, name, " must be a dense tensor, got layout ", x.layout());
}

void check_head_dim(const char* name, const SymInt& head_dim) {
  const int64_t value = head_dim.guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(is_supported_head_dim(value), name, " has unsupported head_dim ", value, "; choose one of ",
                    supported_head_dims());
}

void check_shape(const std::string& name, const Tensor& x, std::initializer_list<SymInt> expected,
                 const char* meaning) {
  TORCH_CHECK_VALUE(x.sym_sizes().equals(c10::SymIntArrayRef(expected.begin(), expected.size())), name, " must be ",
                    meaning, " = ", c10::SymIntArrayRef(expected.begin(), expected.size()), ", got shape ",
                    x.sym_sizes());
}

void check_store_tensor(const std::string& name, const Tensor& x, at::ScalarType type, const Tensor& like) {
  TORCH_CHECK_VALUE(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == like.device(), name, " is on ", x.device(), " but the first argument is on ",
                    like.device(), "; move them to one device");
  TORCH_CHECK_VALUE(x.is_contiguous(), name,
                    " must be contiguous, because it is read and written in place; pass a contiguous buffer");
}

struct StoreShape {
  SymInt batch;
  SymInt num_kv_heads;
  SymInt slots;
  SymInt tail_slots;  // of the tail's ring, after its sink rows; 0 without a tail
  int64_t sink_length;
};

// `like` is the tensor whose device counts.
StoreShape check_side(const char* prefix, const SideArgs& side, int64_t head_dim, int64_t block_size,
                      int64_t sink_length, const Tensor& like) {
  const StorageFormat& format = find_format(side.format);
  const std::string name = std::string(prefix) + "_";
  TORCH_CHECK_VALUE(side.codes.dim() == 4, name, "codes must be [batch, kv_heads, slots, row], got shape ",
                    side.codes.sym_sizes());
  StoreShape shape{side.codes.sym_size(0), side.codes.sym_size(1), side.codes.sym_size(2), 0, sink_length};
  TORCH_CHECK_VALUE(shape.slots <= kMaxPosition, name, "codes must have at most 2^31 - 1 slots, got ", shape.slots);
  check_store_tensor(name + "codes", side.codes, format.is_coded() ? at::kByte : at::kHalf, like);
  const SymInt row = format.is_coded() ? format.row_bytes(head_dim) : head_dim;
  TORCH_CHECK_VALUE(side.codes.sym_size(3) == row, name, "codes must have rows of ", row, " for format ", format.name,
                    " and head_dim ", head_dim, ", got ", side.codes.sym_size(3));
  if (format.is_coded()) {
    TORCH_CHECK_VALUE(side.norms.has_value(), name, "norms are missing: format ", format.name, " needs them");
    check_store_tensor(name + "norms", *side.norms, at::kFloat, like);
    if (head_dim > TQ_NORM_GROUP) {
      check_shape(name + "norms", *side.norms, {shape.batch, shape.num_kv_heads, shape.slots, norm_groups(head_dim)},
                  "[batch, kv_heads, slots, groups]");
    } else {
      check_shape(name + "norms", *side.norms, {shape.batch, shape.num_kv_heads, shape.slots},
                  "[batch, kv_heads, slots]");
    }
  } else {
    TORCH_CHECK_VALUE(!side.norms.has_value(), name, "norms were given, but format f16 has none; pass None");
  }
  if (side.means.has_value()) {
    TORCH_CHECK_VALUE(block_size > 0, name, "means were given, but block_size is 0; pass None, or the block size");
    TORCH_CHECK_VALUE(shape.slots % block_size == 0, name, "codes must have whole blocks: ", shape.slots,
                      " slots are no multiple of block_size ", block_size);
    check_store_tensor(name + "means", *side.means, at::kHalf, like);
    check_shape(name + "means", *side.means, {shape.batch, shape.num_kv_heads, shape.slots / block_size, head_dim},
                "[batch, kv_heads, slots / block_size, head_dim]");
  }
  TORCH_CHECK_VALUE(side.tail.has_value() == (block_size > 0 || sink_length > 0), name,
                    "tail must be given exactly when block_size or sink_length is positive; they are ", block_size,
                    " and ", sink_length, " and the tail is ", side.tail.has_value() ? "given" : "missing");
  if (side.tail.has_value()) {
    check_store_tensor(name + "tail", *side.tail, at::kHalf, like);
    TORCH_CHECK_VALUE(side.tail->dim() == 4, name, "tail must be [batch, kv_heads, tail rows, head_dim], got shape ",
                      side.tail->sym_sizes());
    const SymInt rows = side.tail->sym_size(2);
    check_shape(name + "tail", *side.tail, {shape.batch, shape.num_kv_heads, rows, head_dim},
                "[batch, kv_heads, tail rows, head_dim]");
    TORCH_CHECK_VALUE(rows >= sink_length, name, "tail must have a row for each of sink_length ", sink_length,
                      " tokens, got ", rows, " rows");
    TORCH_CHECK_VALUE(rows <= kMaxPosition, name, "tail must have at most 2^31 - 1 rows, got ", rows);
    shape.tail_slots = rows - sink_length;
  }
  return shape;
}

StoreShape check_stores(const StoreArgs& stores, int64_t head_dim, int64_t block_size, int64_t sink_length,
                        const Tensor& like) {
  TORCH_CHECK_VALUE(0 <= block_size && block_size <= kMaxPosition,
                    "block_size must be 0 (no blocks) or 1 to 2^31 - 1, got ", block_size);
  TORCH_CHECK_VALUE(sink_length >= 0, "sink_length must be 0 (none) or positive, got ", sink_length);
  const StoreShape k = check_side("k", stores.k, head_dim, block_size, sink_length, like);
  const StoreShape v = check_side("v", stores.v, head_dim, block_size, sink_length, like);
  TORCH_CHECK_VALUE(k.batch == v.batch && k.num_kv_heads == v.num_kv_heads && k.slots == v.slots &&
                        k.tail_slots == v.tail_slots,
                    "k and v stores must have the same batch, heads, slots and tail slots, got [", k.batch, ", ",
                    k.num_kv_heads, ", ", k.slots, ", ", k.tail_slots, "] and [", v.batch, ", ", v.num_kv_heads, ", ",
                    v.slots, ", ", v.tail_slots, "]");
  return k;
}

// Positions start..length are held, those from coded on in the tail's ring.
void check_positions(const StoreShape& shape, const SymInt& start, const SymInt& coded, const SymInt& length,
                     int64_t block_size) {
  TORCH_CHECK_VALUE(0 <= start && start <= length && 0 <= coded && coded <= length && length <= kMaxPosition,
                    "positions must satisfy 0 <= start <= length, 0 <= coded <= length <= 2^31 - 1, got start ", start,
                    ", coded ", coded, ", length ", length);
  if (block_size > 0) {
    TORCH_CHECK_VALUE(coded % block_size == 0, "coded must be a multiple of block_size ", block_size, ", got ", coded);
    TORCH_CHECK_VALUE(length - coded <= shape.tail_slots, "positions ", coded, " to ", length, " do not fit a tail of ",
                      shape.tail_slots, " slots and ", shape.sink_length, " sink rows");
  } else {
    TORCH_CHECK_VALUE(coded == length, "without blocks every position is coded: coded must be ", length, ", got ",
                      coded);
  }
  TORCH_CHECK_VALUE(coded <= start || coded - start <= shape.slots, "positions ", start, " to ", coded,
                    " do not fit a store of ", shape.slots, " slots");
}

void check_per_sequence(const char* name, const OptionalTensor& x, const SymInt& batch, const Tensor& like) {
  if (!x.has_value()) return;
  TORCH_CHECK_VALUE(x->scalar_type() == at::kInt, name, " must be int32, got ", x->scalar_type());
  check_store_tensor(name, *x, at::kInt, like);
  check_shape(name, *x, {batch}, "[batch]");
}

// Kernels take numbers as float32.
bool is_finite_number(double value) { return std::isfinite(static_cast<float>(value)); }

bool is_zero_or_positive(double value) {
  return value == 0 || (is_finite_number(value) && static_cast<float>(value) >= std::numeric_limits<float>::min());
}

void check_seed_head_dim(const char* op, const SymInt& head_dim) {
  TORCH_CHECK_VALUE(head_dim == 256 || head_dim == 512, op, ": head_dim must be 256 or 512, got ", head_dim);
}

void check_seed_norms(const char* op, const char* name, const Tensor& norms, const Tensor& packed,
                      const SymInt& head_dim, const Tensor& like) {
  check_store_tensor(std::string(op) + ": " + name, norms, at::kFloat, like);
  const SymInt groups = norm_groups(head_dim.guard_int(__FILE__, __LINE__));
  const std::string label = std::string(op) + ": " + name;
  if (groups > 1) {
    check_shape(label, norms, {packed.sym_size(0), packed.sym_size(1), groups}, "[kv_heads, capacity, 2]");
  } else {
    check_shape(label, norms, {packed.sym_size(0), packed.sym_size(1)}, "[kv_heads, capacity]");
  }
}

SymInt seed_row(int64_t codebook_bits, const SymInt& head_dim) { return codebook_bits == 4 ? head_dim / 2 : head_dim; }

void check_seed_store(const char* op, const char* name, const Tensor& store, at::ScalarType type,
                      const SymInt& kv_heads, const SymInt& capacity, const SymInt& row, const Tensor& like) {
  const std::string label = std::string(op) + ": " + name;
  check_store_tensor(label, store, type, like);
  check_shape(label, store, {kv_heads, capacity, row}, "[kv_heads, capacity, row]");
}

}  // namespace

void check_rotate(const Tensor& x) {
  check_input("x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  check_head_dim("x", x.sym_size(-1));
}

void check_encode(const Tensor& k, const Tensor& v, const StoreArgs& stores, const SymInt& position,
                  const SymInt& coded, const SymInt& coded_end, int64_t block_size, int64_t sink_length,
                  const OptionalTensor& starts, std::string_view encode) {
  check_input("k", k);
  check_input("v", v);
  TORCH_CHECK_VALUE(k.dim() == 4, "k must be [batch, kv_heads, tokens, head_dim], got shape ", k.sym_sizes());
  TORCH_CHECK_VALUE(k.sym_sizes().equals(v.sym_sizes()), "k and v must have the same shape, got ", k.sym_sizes(),
                    " and ", v.sym_sizes());
  TORCH_CHECK_VALUE(k.device() == v.device(), "k is on ", k.device(), " and v on ", v.device(),
                    "; move them to one device");
  check_head_dim("k", k.sym_size(3));
  const StoreShape shape =
      check_stores(stores, k.sym_size(3).guard_int(__FILE__, __LINE__), block_size, sink_length, k);
  TORCH_CHECK_VALUE(k.sym_size(0) == shape.batch && k.sym_size(1) == shape.num_kv_heads, "k must be [", shape.batch,
                    ", ", shape.num_kv_heads, ", tokens, head_dim] like its store, got shape ", k.sym_sizes());
  TORCH_CHECK_VALUE(0 <= position && position <= kMaxPosition, "position must be 0 to 2^31 - 1, got ", position);
  const SymInt end = position + k.sym_size(2);
  TORCH_CHECK_VALUE(0 <= coded && coded <= position && coded <= coded_end && coded_end <= end && end <= kMaxPosition,
                    "positions must satisfy 0 <= coded <= position and coded <= coded_end <= position + tokens",
                    " <= 2^31 - 1, got coded ", coded, ", position ", position, ", coded_end ", coded_end, ", tokens ",
                    k.sym_size(2));
  if (block_size > 0) {
    TORCH_CHECK_VALUE(coded % block_size == 0 && coded_end % block_size == 0,
                      "whole blocks are coded: coded and coded_end must be multiples of block_size ", block_size,
                      ", got ", coded, " and ", coded_end);
    TORCH_CHECK_VALUE(shape.slots % block_size == 0, "the store's ", shape.slots,
                      " slots must be a multiple of block_size ", block_size);
    TORCH_CHECK_VALUE(position - coded <= shape.tail_slots && end - coded_end <= shape.tail_slots, "positions ", coded,
                      " to ", position, " before and ", coded_end, " to ", end, " after must fit a tail of ",
                      shape.tail_slots, " slots and ", shape.sink_length, " sink rows");
  } else {
    TORCH_CHECK_VALUE(coded == position && coded_end == end, "without blocks every position is coded: coded must be ",
                      position, " and coded_end ", end, ", got ", coded, " and ", coded_end);
  }
  TORCH_CHECK_VALUE(coded_end == coded || shape.slots > 0, "the store has no slots for ", coded_end - coded,
                    " positions");
  check_per_sequence("starts", starts, shape.batch, k);
  find_encode(encode);
}

void check_attend(const Tensor& q, const StoreArgs& stores, const SymInt& start, const SymInt& coded,
                  const SymInt& length, int64_t block_size, int64_t sink_length, const AttendOptions& options) {
  check_input("q", q);
  TORCH_CHECK_VALUE(q.dim() == 4, "q must be [batch, heads, tokens, head_dim], got shape ", q.sym_sizes());
  check_head_dim("q", q.sym_size(3));
  const StoreShape shape =
      check_stores(stores, q.sym_size(3).guard_int(__FILE__, __LINE__), block_size, sink_length, q);
  TORCH_CHECK_VALUE(q.sym_size(0) == shape.batch, "q has a batch of ", q.sym_size(0), " but the stores have ",
                    shape.batch);
  TORCH_CHECK_VALUE(shape.num_kv_heads > 0 && q.sym_size(1) > 0, "there must be at least one head, got ", q.sym_size(1),
                    " query heads and ", shape.num_kv_heads, " KV heads");
  TORCH_CHECK_VALUE(q.sym_size(1) % shape.num_kv_heads == 0, "the ", q.sym_size(1),
                    " query heads must be divisible by the ", shape.num_kv_heads, " KV heads");
  check_positions(shape, start, coded, length, block_size);
  TORCH_CHECK_VALUE(!options.scale.has_value() || is_finite_number(*options.scale), "scale must be finite, got ",
                    *options.scale);
  TORCH_CHECK_VALUE(is_zero_or_positive(options.softcap), "softcap must be 0 (none) or a positive number, got ",
                    options.softcap);
  TORCH_CHECK_VALUE(options.window >= 0, "window must be 0 (none) or positive, got ", options.window);
  if (options.sinks.has_value()) {
    check_input("sinks", *options.sinks);
    TORCH_CHECK_VALUE(options.sinks->device() == q.device(), "sinks are on ", options.sinks->device(), " but q is on ",
                      q.device());
    check_shape("sinks", *options.sinks, {q.sym_size(1)}, "[heads]");
  }
  if (options.mask.has_value()) {
    const Tensor& mask = *options.mask;
    TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool, "mask must be bool (True: may be seen), got ",
                      mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == q.device(), "mask is on ", mask.device(), " but q is on ", q.device());
    const SymInt positions = length - start;
    TORCH_CHECK_VALUE(mask.dim() == 3 && (mask.sym_size(0) == 1 || mask.sym_size(0) == shape.batch) &&
                          (mask.sym_size(1) == 1 || mask.sym_size(1) == q.sym_size(2)) && mask.sym_size(2) == positions,
                      "mask must be [1 or batch, 1 or tokens, positions] = [1 or ", shape.batch, ", 1 or ",
                      q.sym_size(2), ", ", positions, "], got shape ", mask.sym_sizes());
  }
  check_per_sequence("starts", options.starts, shape.batch, q);
  check_per_sequence("lengths", options.lengths, shape.batch, q);
}

void check_decode(const StoreArgs& stores, int64_t head_dim, const SymInt& start, const SymInt& coded,
                  const SymInt& length, int64_t block_size, int64_t sink_length, const OptionalTensor& starts) {
  check_head_dim("the store", head_dim);
  const StoreShape shape = check_stores(stores, head_dim, block_size, sink_length, stores.k.codes);
  check_positions(shape, start, coded, length, block_size);
  check_per_sequence("starts", starts, shape.batch, stores.k.codes);
}

void check_seed_rotate(const char* op, const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, op, ": x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  check_seed_head_dim(op, x.sym_size(-1));
}

void check_seed_higher_bits(const char* op, int64_t codebook_bits) {
  TORCH_CHECK_VALUE(codebook_bits == 5 || codebook_bits == 6 || codebook_bits == 8, op,
                    ": codebook_bits must be 5, 6, or 8, got ", codebook_bits);
}

void check_seed_quantize(const char* op, const Tensor& x, const Tensor& packed, const Tensor& norms,
                         const SymInt& write_pos, int64_t codebook_bits, bool is_sliding, double scale_factor_d512) {
  if (codebook_bits != 4) check_seed_higher_bits(op, codebook_bits);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, op, ": x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, op,
                    ": x must be [kv_heads, head_dim] or [kv_heads, tokens, head_dim]", ", got shape ", x.sym_sizes());
  check_seed_head_dim(op, x.sym_size(-1));
  TORCH_CHECK_VALUE(packed.dim() == 3, op, ": packed must be [kv_heads, capacity, row], got shape ",
                    packed.sym_sizes());
  check_seed_store(op, "packed", packed, at::kByte, x.sym_size(0), packed.sym_size(1),
                   seed_row(codebook_bits, x.sym_size(-1)), x);
  check_seed_norms(op, "norms", norms, packed, x.sym_size(-1), x);
  const SymInt tokens = x.dim() == 3 ? x.sym_size(1) : SymInt(1);
  TORCH_CHECK_VALUE(write_pos >= 0 && write_pos <= kMaxPosition, op, ": write_pos must be 0 to 2^31 - 1, got ",
                    write_pos);
  TORCH_CHECK_VALUE(is_sliding ? packed.sym_size(1) > 0 : write_pos + tokens <= packed.sym_size(1), op, ": write_pos ",
                    write_pos, " and ", tokens, " tokens do not fit a capacity of ", packed.sym_size(1));
  TORCH_CHECK_VALUE(is_zero_or_positive(scale_factor_d512), op,
                    ": scale_factor_d512 must be a finite number, 0 for 1, got ", scale_factor_d512);
}

std::pair<int64_t, int64_t> check_seed_attention(const SeedArgs& a) {
  TORCH_CHECK_VALUE(a.q.scalar_type() == at::kFloat, a.op, ": q must be float32, got ", a.q.scalar_type());
  TORCH_CHECK_VALUE(a.q.dim() == 2 || (a.q.dim() == 3 && a.q.sym_size(1) == 1), a.op,
                    ": q must be [heads, head_dim] or [heads, 1, head_dim], got shape ", a.q.sym_sizes());
  const SymInt head_dim = a.q.sym_size(-1);
  check_seed_head_dim(a.op, head_dim);
  TORCH_CHECK_VALUE(a.k.dim() == 3, a.op, ": k must be [kv_heads, capacity, row], got shape ", a.k.sym_sizes());
  const SymInt kv_heads = a.k.sym_size(0);
  const SymInt capacity = a.k.sym_size(1);
  TORCH_CHECK_VALUE(a.q.sym_size(0) > 0 && kv_heads > 0, a.op, ": num_heads and num_kv_heads must be > 0, got ",
                    a.q.sym_size(0), " and ", kv_heads);
  TORCH_CHECK_VALUE(a.q.sym_size(0) % kv_heads == 0, a.op, ": num_heads (", a.q.sym_size(0),
                    ") must be divisible by num_kv_heads (", kv_heads, ")");
  TORCH_CHECK_VALUE(a.kv_seq_len > 0, a.op, ": kv_seq_len must be > 0, got ", a.kv_seq_len);
  TORCH_CHECK_VALUE(capacity >= a.kv_seq_len, a.op, ": kv_capacity (", capacity, ") must be >= kv_seq_len (",
                    a.kv_seq_len, ")");
  const std::string_view kind = a.kind;
  if (kind != "tq") check_seed_higher_bits(a.op, a.codebook_bits);
  const SymInt row = seed_row(a.codebook_bits, head_dim);
  if (kind == "hybrid") {
    TORCH_CHECK_VALUE(a.k.scalar_type() == at::kHalf, a.op, ": k_f16 must be float16, got ", a.k.scalar_type());
    check_seed_store(a.op, "k_f16", a.k, at::kHalf, kv_heads, capacity, head_dim, a.q);
  } else {
    check_seed_store(a.op, "k_packed", a.k, at::kByte, kv_heads, capacity, row, a.q);
    check_seed_norms(a.op, "k_norms", *a.k_norms, a.k, head_dim, a.q);
  }
  if (kind == "hybrid" && a.v.scalar_type() == at::kHalf) {
    check_seed_store(a.op, "v_packed", a.v, at::kHalf, kv_heads, capacity, head_dim, a.q);
  } else {
    check_seed_store(a.op, "v_packed", a.v, at::kByte, kv_heads, capacity, row, a.q);
    TORCH_CHECK_VALUE(a.v_norms.has_value(), a.op, ": v_norms are missing: coded values need them");
    check_seed_norms(a.op, "v_norms", *a.v_norms, a.v, head_dim, a.q);
  }
  TORCH_CHECK_VALUE(is_finite_number(a.scale), a.op, ": scale must be finite, got ", a.scale);
  TORCH_CHECK_VALUE(a.mask_type >= 0 && a.mask_type <= 2, a.op,
                    ": mask_type must be 0 (none), 1 (causal) or 2 (sliding window), got ", a.mask_type);
  TORCH_CHECK_VALUE(a.sliding_window >= 0, a.op, ": sliding_window must not be negative, got ", a.sliding_window);
  TORCH_CHECK_VALUE(is_zero_or_positive(a.softcap), a.op, ": softcap must be 0 (none) or a positive number, got ",
                    a.softcap);
  TORCH_CHECK_VALUE(a.ring_start >= 0 && a.ring_start < capacity, a.op, ": ring_start must be a slot, 0 to ",
                    capacity - 1, ", got ", a.ring_start);
  TORCH_CHECK_VALUE(is_zero_or_positive(a.scale_factor_d512), a.op,
                    ": scale_factor_d512 must be a finite number, 0 for 1, got ", a.scale_factor_d512);
  TORCH_CHECK_VALUE(a.nwg >= 0 && a.nwg <= 32, a.op, ": nwg must be 1 to 32, or 0 for the launch policy, got ", a.nwg);
  TORCH_CHECK_VALUE(a.nsg == 0 || a.nsg == 1 || a.nsg == 2 || a.nsg == 4, a.op,
                    ": nsg must be a power of 2 and at most 4, or 0 for the launch policy, got ", a.nsg);
  // A symbolic length must not be pinned to one number; nothing is launched then, and 32 is the most that may be.
  const std::optional<int64_t> length = a.kv_seq_len.maybe_as_int();
  const LaunchPolicy policy = length.has_value() ? launch_policy(kind, *length) : LaunchPolicy{32, 4};
  const LaunchPolicy launch{a.nwg > 0 ? a.nwg : policy.nwg, a.nsg > 0 ? a.nsg : policy.nsg};
  if (a.tmp.has_value()) {
    check_store_tensor(std::string(a.op) + ": tmp", *a.tmp, at::kFloat, a.q);
    const SymInt needed = a.q.sym_size(0) * launch.nwg * (head_dim + 2);
    TORCH_CHECK_VALUE(a.tmp->sym_numel() >= needed, a.op, ": tmp must hold num_heads * nwg * (head_dim + 2) = ", needed,
                      " numbers, got ", a.tmp->sym_numel());
  }
  return {launch.nwg, launch.nsg};
}

void check_seed_reduce(const char* op, const Tensor& tmp, const SymInt& nrows, int64_t head_dim, int64_t nwg) {
  check_seed_head_dim(op, head_dim);
  TORCH_CHECK_VALUE(nwg > 0 && nwg <= 32, op, ": nwg must be > 0 and at most 32, got ", nwg);
  TORCH_CHECK_VALUE(nrows >= 0, op, ": nrows must not be negative, got ", nrows);
  check_store_tensor(std::string(op) + ": tmp", tmp, at::kFloat, tmp);
  TORCH_CHECK_VALUE(nrows <= tmp.sym_numel() && nrows * nwg * (head_dim + 2) <= tmp.sym_numel(), op,
                    ": tmp must hold nrows * nwg * (head_dim + 2) numbers for ", nrows, " rows and nwg ", nwg, ", got ",
                    tmp.sym_numel());
}

}  // namespace tqattn
