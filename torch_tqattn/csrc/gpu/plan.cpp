#include "plan.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

namespace tqattn::gpu {
namespace {

using at::Tensor;

constexpr uint32_t kSimdLanes = 32;
constexpr uint32_t kLaneNumbers = 16;      // of a row, in one lane of a simdgroup
constexpr uint32_t kSimdgroups = 4;        // of a threadgroup, unless there is a reason for another number
constexpr uint32_t kMatrixSimdgroups = 8;  // of a threadgroup of attend_matrix.metal, at least
constexpr int64_t kWordBytes = 4;          // codes are read in words
constexpr int64_t kFewestPositions = 64;   // of a simdgroup: fewer cost more to merge than they save
constexpr int64_t kMatrixPositions = 16;   // that a simdgroup of attend_matrix.metal takes at a time: a tile
constexpr uint32_t kMatrixSpare = 1024;  // bytes of threadgroup memory that a processor has and no threadgroup can get
constexpr uintptr_t kMatrixBytes = 16;   // that it reads at a time

using Macros = std::vector<std::pair<const char*, std::string>>;

// The name of a type in the shaders.
const char* shader_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float";
    case at::kHalf:
      return "half";
    case at::kBFloat16:
      return "bfloat";
    default:
      TORCH_INTERNAL_ASSERT(false, "no shader takes ", type);
  }
}

uint32_t to_count(int64_t count, const char* what) {
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max(), "a GPU kernel takes at most 2^31 - 1 ", what,
                    ", got ", count);
  return static_cast<uint32_t>(count);
}

uint32_t divide_up(int64_t count, int64_t size) { return to_count((count + size - 1) / size, "threadgroups"); }

uint32_t power_of_two_from(uint32_t count) {
  uint32_t power = 1;
  while (power < count) power *= 2;
  return power;
}

// n, if `count` is 2 to the power of n; else 0.
uint32_t exact_log2(uint32_t count) {
  for (uint32_t n = 1; n < 32; ++n) {
    if (count == 1u << n) return n;
  }
  return 0;
}

// Rows that one simdgroup holds.
uint32_t simd_rows(int64_t head_dim) {
  return kSimdLanes / power_of_two_from(static_cast<uint32_t>(head_dim) / kLaneNumbers);
}

uint32_t padded_bytes(int64_t floats) { return static_cast<uint32_t>((floats * sizeof(float) + 15) / 16 * 16); }

Argument optional(const OptionalTensor& x) { return x.has_value() ? Argument(x->contiguous()) : Argument::unused(); }

void add_side(Macros& macros, bool is_k, const Side& side) {
  const StorageFormat& format = *side.format;
  macros.emplace_back(is_k ? "TQ_K_BITS" : "TQ_V_BITS",
                      std::to_string(side.codebook != nullptr ? side.codebook->bits : 16));
  macros.emplace_back(is_k ? "TQ_K_LOW" : "TQ_V_LOW", std::to_string(format.low_plane));
  macros.emplace_back(is_k ? "TQ_K_HIGH" : "TQ_V_HIGH", std::to_string(format.high_plane));
  macros.emplace_back(is_k ? "TQ_K_MEANS" : "TQ_V_MEANS", side.means.has_value() ? "1" : "0");
}

// Kernels count the bytes of a KV head's rows in 32 bits.
void check_size(const Side& side) {
  const int64_t slots = side.codes.size(2), bytes = slots * side.codes.size(3) * side.codes.element_size();
  TORCH_CHECK_VALUE(bytes <= std::numeric_limits<uint32_t>::max(),
                    "on a GPU the store of a KV head must be smaller than 4 GiB; its ", slots, " slots in format ",
                    side.format->name, " take ", bytes, " bytes: use a smaller capacity or fewer bits, or the CPU");
}

// The macros that every kernel for a cache needs, once it is known that they can serve it.
Macros store_macros(const Side& k, const Side& v, int64_t head_dim) {
  check_size(k);
  check_size(v);
  Macros macros{{"TQ_HEAD_DIM", std::to_string(head_dim)}};
  add_side(macros, true, k);
  add_side(macros, false, v);
  macros.emplace_back("TQ_TAIL", k.tail.has_value() ? "1" : "0");
  const auto is_exact = [](const Side& side) { return side.codebook != nullptr && side.codebook->integers == nullptr; };
  macros.emplace_back("TQ_EXACT_LEVELS", is_exact(k) || is_exact(v) ? "1" : "0");
  return macros;
}

void add_store(std::vector<Argument>& arguments, const Side& side) {
  arguments.emplace_back(side.codes, kWordBytes);
  arguments.push_back(optional(side.norms));
  arguments.push_back(optional(side.means));
  arguments.push_back(optional(side.tail));
}

// Which kernel attends, and how its work is cut.
struct Variant {
  const char* shader;
  const char* kernel;
  uint32_t queries;          // query rows of a threadgroup
  uint32_t simdgroups;       // of a threadgroup, if there are positions enough for them
  int64_t fewest_positions;  // of a simdgroup
  uint32_t threadgroups;     // how many keep the device busy
  uint32_t (*floats)(const AttendCall& call, const Variant& variant, uint32_t simdgroups);  // of threadgroup memory
  bool finishes;           // whether it leaves results, not parts, where there is but one part
  bool is_staged = false;  // whether a simdgroup has threadgroup memory for a tile that it asks for ahead
};

uint32_t attend_floats(const AttendCall& call, const Variant& variant, uint32_t simdgroups) {
  return std::max(simdgroups / 2, 1u) * variant.queries * static_cast<uint32_t>(call.q.size(3) + 2);
}

uint32_t table_entries(const Side& side) {
  return side.codebook != nullptr ? TQ_TABLE_ENTRIES(side.codebook->bits) : 0;
}

// Of a tile's codes and norms, as attend_matrix.metal has them.
uint32_t tile_bytes(const AttendCall& call) {
  uint32_t bytes = 0;
  if (call.k.codebook != nullptr) bytes += TQ_STAGED_K_ROW(static_cast<uint32_t>(call.k.codes.size(3))) + 4;
  if (call.v.codebook != nullptr) bytes += TQ_STAGED_V_ROW(static_cast<uint32_t>(call.v.codes.size(3))) + 4;
  return kMatrixPositions * bytes;
}

uint32_t attend_matrix_floats(const AttendCall& call, const Variant& variant, uint32_t simdgroups) {
  const uint32_t head_dim = static_cast<uint32_t>(call.q.size(3));
  const uint32_t entries = std::max(table_entries(call.k), table_entries(call.v));
  const uint32_t first = entries * 2 * kSimdLanes + variant.queries * (head_dim / 2 + 17);
  const uint32_t sums = variant.queries * (head_dim + 4);
  if (!variant.is_staged) return std::max(first, (simdgroups + 1) * sums);
  return first + simdgroups * std::max<uint32_t>(tile_bytes(call) / sizeof(float), sums);
}

// Whether the store, and blocks, if there are any, are cut into whole tiles. A tile of dense values may not be whole:
// what follows its positions need not be a number, and even with a weight of 0 would be added.
bool is_whole(const AttendCall& call) {
  const bool has_means = call.k.means.has_value() || call.v.means.has_value();
  const bool has_whole_blocks = !has_means || call.params.block_size % kMatrixPositions == 0;
  return call.params.slots % kMatrixPositions == 0 && has_whole_blocks && call.v.codebook != nullptr;
}

bool is_aligned(const OptionalTensor& x) {
  return !x.has_value() || reinterpret_cast<uintptr_t>(x->data_ptr()) % kMatrixBytes == 0;
}

bool is_aligned(const Side& side) {
  return is_aligned(side.codes) && is_aligned(side.norms) && is_aligned(side.means) && is_aligned(side.tail);
}

Variant choose_variant(const AttendCall& call, const Tensor& q, int64_t group_rows, const Device& device) {
  const int64_t head_dim = call.q.size(3);
  const bool is_half = call.q.scalar_type() == at::kHalf || call.q.scalar_type() == at::kBFloat16;
  const bool has_rows = is_aligned(call.k) && is_aligned(call.v);
  if (is_half && head_dim % 64 == 0 && head_dim <= 256 && has_rows && is_aligned(q)) {
    const uint32_t queries = group_rows > 8 && head_dim <= 128 ? 16 : 8;
    const uint32_t simdgroups = TQ_MATRIX_THREADS(head_dim, queries) / kSimdLanes;
    Variant variant{"attend_matrix",          "tq_attend_matrix",   queries, simdgroups, kMatrixPositions,
                    device.matrix_processors, attend_matrix_floats, true};
    const auto fits = [&] { return padded_bytes(variant.floats(call, variant, simdgroups)) <= device.matrix_bytes; };
    variant.is_staged = is_whole(call);
    if (!fits()) variant.is_staged = false;
    if (device.matrix_processors > 0 && fits() && call.simdgroups <= simdgroups) return variant;
  }
  const uint32_t rows = power_of_two_from(to_count(group_rows, "query rows"));
  return {
      "attend",      "tq_attend", std::min(device.queries, rows), kSimdgroups, kFewestPositions, device.threadgroups,
      attend_floats, false};
}

// Whether the threadgroups of these tasks run all at once if those of a task are a cluster. Its processors have to be
// near each other: of an H200's 132, pairs can have all, clusters of 4 and of 8 can have 120.
bool fits_in_clusters(int64_t tasks, int64_t splits, uint32_t simdgroups, const Variant& variant,
                      const Device& device) {
  const int64_t of_processor = std::max(variant.simdgroups / simdgroups, 1u);
  const int64_t room = variant.threadgroups * of_processor;
  return device.has_clusters && tasks * splits <= (splits == 2 ? room : room * 3 / 4);
}

// Threadgroups that encode_block.metal codes a block in; 0: it does not do what the call asks for.
uint32_t count_pieces(const EncodeCall& call, const Device& device) {
  const int64_t head_dim = call.inputs.front().x.size(3), tokens = call.inputs.front().x.size(2);
  // Of such head dims a simdgroup holds one row, spread over all of its lanes.
  const bool is_one_row = exact_log2(static_cast<uint32_t>(head_dim)) > 0;
  const bool is_one_block = call.block_size > 0 && call.coded_end - call.coded == call.block_size;
  if (!device.has_clusters || !is_one_row || !is_one_block || call.coded_end > call.position || tokens > 1) return 0;
  const uint32_t pieces = power_of_two_from(divide_up(call.block_size, TQ_PIECE_ROWS));
  // One threadgroup is no cluster, and would have nobody to send its sums to.
  return pieces > 1 && pieces <= TQ_MOST_OF_CLUSTER ? pieces : 0;
}

Launch reduce_launch(const Tensor& partials, const OptionalTensor& sinks, const Tensor& out, const OptionalTensor& lse,
                     const TqReduceParams& params, const TqFinishParams& finish, int64_t head_dim) {
  return {{"reduce",
           "tq_reduce",
           {{"TQ_HEAD_DIM", std::to_string(head_dim)},
            {"TQ_OUTPUT", shader_type(out.scalar_type())},
            {"TQ_WIDE", is_aligned(partials) ? "1" : "0"}}},
          {Argument(partials), optional(sinks), Argument(out), optional(lse), Argument::value(params),
           Argument::value(finish)},
          {params.rows, 1, 1},
          1};
}

}  // namespace

std::vector<Launch> plan_rotate(const Tensor& x, bool inverse, const Tensor& out) {
  const int64_t head_dim = x.size(-1), rows = x.numel() / head_dim;
  return {{{"rotate",
            inverse ? "tq_undo_rotation_of_rows" : "tq_rotate_rows",
            {{"TQ_HEAD_DIM", std::to_string(head_dim)}, {"TQ_INPUT", shader_type(x.scalar_type())}}},
           {Argument(x.contiguous()), Argument(out), Argument::value(to_count(rows, "rows"))},
           {divide_up(rows, int64_t{simd_rows(head_dim)} * kSimdgroups), 1, 1},
           kSimdgroups}};
}

std::vector<Launch> plan_encode(const EncodeCall& call, const Device& device) {
  const EncodeCall::Input& k = call.inputs.front();
  const EncodeCall::Input& v = call.inputs.back();
  const uint32_t sides = static_cast<uint32_t>(call.inputs.size());
  const int64_t head_dim = k.x.size(3), tokens = k.x.size(2), heads = k.x.size(0) * k.x.size(1);
  const bool is_same_type = k.x.scalar_type() == v.x.scalar_type();
  const auto input = [&](const Tensor& x) { return (is_same_type ? x : x.to(at::kFloat)).contiguous(); };
  const Tensor k_input = input(k.x), v_input = sides > 1 ? input(v.x) : k_input;
  const int64_t slots = k.side.codes.size(2);
  const uint32_t group_rows = simd_rows(head_dim) * kSimdgroups;

  TqEncodeParams params{};
  params.num_kv_heads = static_cast<uint32_t>(k.x.size(1));
  params.tokens = to_count(tokens, "tokens");
  params.slots = to_count(slots, "slots");
  params.tail_slots = k.side.tail.has_value() ? static_cast<uint32_t>(k.side.tail->size(2) - call.sink_length) : 0;
  params.sink_length = static_cast<uint32_t>(call.sink_length);
  params.block_size = static_cast<uint32_t>(call.block_size);
  params.position = to_count(call.position, "positions");
  // What this very call would overwrite is not coded at all.
  params.coded_begin = to_count(std::max(call.coded, call.coded_end - slots), "positions");
  params.coded_end = to_count(call.coded_end, "positions");
  params.unit = call.block_size > 0 ? params.block_size : group_rows;
  params.kept = group_rows;
  params.encode = static_cast<uint32_t>(call.encode);
  params.has_starts = call.starts.has_value();
  params.k_norm_factor = k.side.norm_factor;
  params.v_norm_factor = v.side.norm_factor;

  Macros macros = store_macros(k.side, v.side, head_dim);
  macros.emplace_back("TQ_INPUT", shader_type(k_input.scalar_type()));
  macros.emplace_back("TQ_WIDE", is_aligned(k.side.tail) && is_aligned(v.side.tail) ? "1" : "0");
  std::vector<Launch> launches;
  std::vector<Argument> arguments;
  if (params.coded_end > params.coded_begin) {
    arguments = {Argument(k_input), Argument(v_input)};
    add_store(arguments, k.side);
    add_store(arguments, v.side);
    arguments.push_back(optional(call.starts));
  }
  if (const uint32_t pieces = count_pieces(call, device); pieces > 0) {
    params.first_row = params.coded_begin % params.tail_slots;
    params.first_slot = params.coded_begin % params.slots;
    params.mean_ring = params.slots / params.block_size;
    params.first_mean = params.first_slot / params.block_size;
    // The new token may take the place of a row of the block: only the threadgroup that reads the row knows when.
    const uint32_t row = (params.position - params.coded_begin) % params.tail_slots;
    params.keeper = tokens == 0 ? pieces : row < params.block_size ? row / TQ_PIECE_ROWS : 0;
    arguments.push_back(Argument::value(params));
    macros.emplace_back("TQ_PIECES", std::to_string(pieces));
    macros.emplace_back("TQ_BEST", call.encode == Encode::kBest ? "1" : "0");
    const int64_t sums = int64_t{pieces + TQ_PIECE_ROWS} * (head_dim + 4);
    launches.push_back({{"encode_block", "tq_encode_block", std::move(macros)},
                        std::move(arguments),
                        {pieces, to_count(heads, "heads"), sides},
                        TQ_PIECE_THREADS / kSimdLanes,
                        {padded_bytes(4 + TQ_BOOK_FLOATS + head_dim + sums)},
                        pieces});
    return launches;
  }
  if (params.coded_end > params.coded_begin) {
    const uint32_t units = divide_up(params.coded_end - params.coded_begin, params.unit);
    // Pairs of simdgroups add up what they have read.
    const uint32_t pairs = divide_up(params.unit, 2 * simd_rows(head_dim));
    const uint32_t simdgroups =
        2 * std::clamp(pairs, kSimdgroups / 2, std::max(device.encode_simdgroups, kSimdgroups) / 2);
    const int64_t pieces = device.encode_threadgroups / (int64_t{units} * heads * sides);
    params.pieces = static_cast<uint32_t>(std::clamp<int64_t>(pieces, 1, divide_up(params.unit, group_rows)));
    arguments.push_back(Argument::value(params));
    launches.push_back({{"encode", "tq_encode", macros},
                        std::move(arguments),
                        {to_count(int64_t{units} * params.pieces, "threadgroups"), to_count(heads, "heads"), sides},
                        simdgroups,
                        {padded_bytes(simdgroups * (head_dim + 1))}});
  }
  if (k.side.tail.has_value() && tokens > 0) {
    // After the blocks have been coded: their oldest rows may lie where the newest tokens go.
    launches.push_back({{"encode", "tq_keep", macros},
                        {Argument(k_input), Argument(v_input), optional(k.side.tail), optional(v.side.tail),
                         optional(call.starts), Argument::value(params)},
                        {divide_up(tokens, group_rows), to_count(heads, "heads"), sides},
                        kSimdgroups});
  }
  return launches;
}

std::vector<Launch> plan_attend(const AttendCall& call, const Device& device) {
  const int64_t head_dim = call.q.size(3), batch = call.q.size(0);
  TqAttendParams params = call.params;
  const Tensor q = call.q.contiguous();
  const int64_t group_rows = int64_t{params.q_len} * params.num_heads / params.num_kv_heads;
  const Variant variant = choose_variant(call, q, group_rows, device);
  const int64_t tiles = (group_rows + variant.queries - 1) / variant.queries;
  int64_t positions = int64_t{params.length} - params.start;
  if (params.window > 0) positions = std::min<int64_t>(positions, int64_t{params.window} + params.q_len - 1);
  uint32_t simdgroups = static_cast<uint32_t>(call.simdgroups);
  const int64_t tasks = batch * params.num_kv_heads * tiles;
  if (simdgroups == 0) {
    simdgroups = variant.simdgroups;
    const int64_t fewest = variant.fewest_positions;
    if (variant.finishes) {
      // As few as will do once positions are spread over the device: they share its processors' time.
      const int64_t spread = positions * tasks / (2 * fewest) / std::max(variant.threadgroups, 1u) + 1;
      simdgroups = std::clamp<int64_t>(spread, std::min(kMatrixSimdgroups, simdgroups), simdgroups);
    } else if (positions <= simdgroups * fewest) {
      simdgroups = 1;
    }
  }
  if (params.splits == 0) {
    const int64_t most = std::max<int64_t>(positions / (simdgroups * variant.fewest_positions), 1);
    params.splits = static_cast<uint32_t>(std::clamp<int64_t>(variant.threadgroups / tasks, 1, most));
    // Fewer and larger threadgroups, if these are one cluster and a simdgroup has but a tile: another kernel takes
    // longer.
    const int64_t cluster_positions = int64_t{TQ_MOST_OF_CLUSTER} * variant.simdgroups * variant.fewest_positions;
    if (device.has_clusters && variant.finishes && call.simdgroups == 0 && params.splits > TQ_MOST_OF_CLUSTER &&
        positions <= cluster_positions) {
      params.splits = TQ_MOST_OF_CLUSTER;
      simdgroups = variant.simdgroups;
    }
  }
  const bool is_cluster = variant.finishes && !call.partials.has_value() && params.splits <= TQ_MOST_OF_CLUSTER &&
                          (params.splits == 1 || fits_in_clusters(tasks, params.splits, simdgroups, variant, device));
  params.batch = static_cast<uint32_t>(batch);
  params.has_starts = call.starts.has_value();
  params.has_lengths = call.lengths.has_value();
  params.rotate_q = call.rotate_q;
  params.k_norm_factor = call.k.norm_factor;
  params.v_norm_factor = call.v.norm_factor;
  params.heads_per_kv = params.num_heads / params.num_kv_heads;
  params.query_tiles = to_count(tiles, "threadgroups");
  params.first_slot = params.slots > 0 ? params.start % params.slots : 0;
  params.mean_ring = params.block_size > 0 ? params.slots / params.block_size : 1;
  params.block_shift = exact_log2(params.block_size);
  // Dense tiles take longer. Where there is hardly more than a tile for each simdgroup, that makes no difference.
  params.dense_shift = positions < 2 * kMatrixPositions * params.splits * simdgroups ? 0 : 1;
  params.part = 1.0f / static_cast<float>(params.splits * simdgroups);

  const int64_t rows = batch * params.num_heads * params.q_len;
  const OptionalTensor sinks =
      call.sinks.has_value() ? OptionalTensor(call.sinks->to(at::kFloat).contiguous()) : std::nullopt;
  TqFinishParams finish{};
  finish.is_finished = is_cluster;
  finish.has_sinks = sinks.has_value();
  finish.has_lse = call.lse.has_value();
  finish.undo_rotation = call.undo_rotation;
  Tensor partials;
  if (call.partials.has_value()) {
    partials = *call.partials;
  } else if (finish.is_finished == 0) {
    partials = at::empty({rows * params.splits * (head_dim + 2)}, call.q.options().dtype(at::kFloat));
  }
  Macros macros = store_macros(call.k, call.v, head_dim);
  macros.emplace_back("TQ_INPUT", shader_type(q.scalar_type()));
  macros.emplace_back("TQ_QUERIES", std::to_string(variant.queries));
  std::vector<Argument> arguments{Argument(q)};
  add_store(arguments, call.k);
  add_store(arguments, call.v);
  arguments.push_back(optional(call.mask));
  arguments.push_back(optional(call.starts));
  arguments.push_back(optional(call.lengths));
  arguments.push_back(partials.defined() ? Argument(partials) : Argument::unused());
  arguments.push_back(Argument::value(params));
  if (variant.finishes) {
    macros.emplace_back("TQ_WHOLE", is_whole(call) ? "1" : "0");
    macros.emplace_back("TQ_STAGED", variant.is_staged ? "1" : "0");
    macros.emplace_back("TQ_OUTPUT", shader_type(call.out.scalar_type()));
    arguments.push_back(optional(sinks));
    arguments.emplace_back(call.out);
    arguments.push_back(optional(call.lse));
    arguments.push_back(Argument::value(finish));
  }
  TqReduceParams reduce{};
  reduce.rows = to_count(rows, "query rows");
  reduce.splits = params.splits;
  reduce.num_heads = params.num_heads;
  reduce.num_kv_heads = params.num_kv_heads;
  reduce.q_len = params.q_len;
  uint32_t bytes = padded_bytes(variant.floats(call, variant, simdgroups));
  // If there is a processor for each threadgroup, no two should share one, as those do that find an earlier kernel's
  // still running: each asks for more than half of the memory.
  const bool has_room = tasks * params.splits <= variant.threadgroups &&
                        (!is_cluster || params.splits == 1 ||
                         fits_in_clusters(tasks, params.splits, variant.simdgroups, variant, device));
  if (variant.finishes && has_room) bytes = std::max(bytes, device.matrix_bytes / 2 / 16 * 16 + kMatrixSpare);
  std::vector<Launch> launches{{{variant.shader, variant.kernel, std::move(macros)},
                                std::move(arguments),
                                {params.splits, to_count(params.num_kv_heads * tiles, "threadgroups"), params.batch},
                                simdgroups,
                                {bytes},
                                is_cluster ? params.splits : 1}};
  if (finish.is_finished == 0) {
    launches.push_back(reduce_launch(partials, sinks, call.out, call.lse, reduce, finish, head_dim));
  }
  return launches;
}

std::vector<Launch> plan_decode(const DecodeCall& call) {
  const Side& k = call.sides.front();
  const Side& v = call.sides.back();
  const int64_t head_dim = call.params.head_dim;
  TqDecodeParams params{};
  params.num_kv_heads = call.params.num_kv_heads;
  params.slots = call.params.slots;
  params.tail_slots = call.params.tail_slots;
  params.sink_length = call.params.sink_length;
  params.block_size = call.params.block_size;
  params.start = call.params.start;
  params.coded = call.params.coded;
  params.length = call.params.length;
  params.has_starts = call.starts.has_value();
  params.undo_rotation = call.undo_rotation;
  std::vector<Argument> arguments;
  add_store(arguments, k);
  add_store(arguments, v);
  arguments.push_back(optional(call.starts));
  arguments.emplace_back(call.outs.front());
  arguments.emplace_back(call.outs.back());
  arguments.push_back(Argument::value(params));
  const int64_t heads = call.outs.front().size(0) * params.num_kv_heads;
  return {{{"decode", "tq_decode", store_macros(k, v, head_dim)},
           std::move(arguments),
           {divide_up(params.length - params.start, int64_t{simd_rows(head_dim)} * kSimdgroups),
            to_count(heads, "heads"), static_cast<uint32_t>(call.sides.size())},
           kSimdgroups}};
}

std::vector<Launch> plan_reduce(const ReduceCall& call) {
  TqReduceParams params{};
  params.rows = to_count(call.rows, "query rows");
  params.splits = to_count(call.splits, "splits");
  params.num_heads = params.num_kv_heads = params.rows;
  params.q_len = 1;
  TqFinishParams finish{};
  finish.undo_rotation = call.undo_rotation;
  return {reduce_launch(call.partials, std::nullopt, call.out, std::nullopt, params, finish, call.head_dim)};
}

}  // namespace tqattn::gpu
