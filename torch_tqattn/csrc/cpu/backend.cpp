// The CPU backend: splits the work into tasks, and merges what they return.
#include "../backend.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../launch_policy.h"
#include "kernels.h"
#include "parallel.h"

namespace tqattn::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best = []() -> const Kernels& {
    const std::string allowed = at::get_cpu_capability();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    if (has_avx512 && allowed == "AVX512") return avx512_kernels();
    if (has_avx2 && (allowed == "AVX512" || allowed == "AVX2")) return avx2_kernels();
    return baseline_kernels();
  }();
  return best;
#else
  return baseline_kernels();
#endif
}

namespace {

using at::Tensor;

constexpr int64_t kRowsPerThread = 128;  // to rotate or to merge: fewer take less time than waking a thread

int64_t first_position(const OptionalTensor& starts, int64_t batch) {
  return starts.has_value() ? std::max(starts->const_data_ptr<int32_t>()[batch], 0) : 0;
}

// Head `head` (batch * kv_heads + kv_head) of a side.
HeadStore head_store(const Side& side, int64_t head, const OptionalTensor& starts) {
  const int64_t slots = side.codes.size(2), row = side.codes.size(3);
  const int64_t row_bytes = row * side.codes.element_size();
  const auto half = [head](const OptionalTensor& x) {
    return x.has_value() ? x->mutable_data_ptr<at::Half>() + head * x->size(2) * x->size(3) : nullptr;
  };
  HeadStore store{};
  store.codes = static_cast<uint8_t*>(side.codes.mutable_data_ptr()) + head * slots * row_bytes;
  store.norms = side.norms.has_value() ? side.norms->mutable_data_ptr<float>() +
                                             head * slots * (side.norms->dim() == 4 ? side.norms->size(3) : 1)
                                       : nullptr;
  store.means = half(side.means);
  store.tail = half(side.tail);
  store.first = first_position(starts, head / side.codes.size(1));
  store.format = side.format;
  store.codebook = side.codebook;
  store.levels = side.codebook != nullptr ? &level_table(*side.codebook) : nullptr;
  store.row_bytes = row_bytes;
  store.norm_factor = side.norm_factor;
  return store;
}

InputType input_type(at::ScalarType type) {
  return type == at::kHalf ? InputType::kHalf : type == at::kBFloat16 ? InputType::kBFloat16 : InputType::kFloat;
}

// How the positions that a call codes are split: first come those for which the tail is read, all in one part, since
// that part also writes the tail; then one part for each `unit` positions.
struct EncodeParts {
  int64_t begin;  // blocks that this very call would overwrite are not coded at all
  int64_t from_tail_end;
  int64_t end;
  int64_t unit;
  int64_t count;

  EncodeParts(const EncodeCall& call, int64_t slots) {
    begin = std::max(call.coded, call.coded_end - slots);
    end = call.coded_end;
    unit = call.block_size > 0 ? call.block_size : 128;
    const int64_t waiting = std::max<int64_t>(call.position - begin, 0);
    from_tail_end = std::min(end, begin + (waiting + unit - 1) / unit * unit);
    count = 1 + (end - from_tail_end + unit - 1) / unit;
  }
};

constexpr int64_t kNumbersPerThread = 1 << 18;  // about 0.1 ms: waking a thread up for less does not pay

EncodeTask encode_task(const EncodeCall& call, const EncodeCall::Input& input, const Tensor& x, int64_t head) {
  const int64_t kv_heads = x.size(1);
  EncodeTask task{};
  task.store = head_store(input.side, head, call.starts);
  task.x = static_cast<const char*>(x.const_data_ptr()) +
           (head / kv_heads * x.stride(0) + head % kv_heads * x.stride(1)) * x.element_size();
  task.type = input_type(x.scalar_type());
  task.stride = x.stride(2);
  task.position = call.position;
  task.end = call.position + x.size(2);
  task.head_dim = x.size(3);
  task.slots = input.side.codes.size(2);
  task.tail_slots = input.side.tail.has_value() ? input.side.tail->size(2) - call.sink_length : 0;
  task.sink_length = call.sink_length;
  task.block_size = call.block_size;
  task.encode = call.encode;
  return task;
}

void encode_part(const Kernels& run, const EncodeCall& call, const EncodeTask& task, const EncodeParts& parts,
                 int64_t part, at::Half* gathered) {
  int64_t begin = part == 0 ? parts.begin : parts.from_tail_end + (part - 1) * parts.unit;
  const int64_t part_end = part == 0 ? parts.from_tail_end : std::min(begin + parts.unit, parts.end);
  while (begin < part_end) {
    const int64_t wrap = (begin / task.slots + 1) * task.slots;
    const int64_t end = std::min({begin + parts.unit, part_end, wrap});
    run.encode(task, begin, end, gathered);
    begin = end;
  }
  if (part == 0) run.store_dense(task, std::max(call.coded_end, call.position), task.end);
}

// What one query row may see.
struct Visibility {
  int64_t begin;
  int64_t end;
  const bool* mask;  // of positions from params.start on; null without a mask
};

Visibility visibility(const AttendCall& call, const Tensor& mask, int64_t batch, int64_t token) {
  const TqAttendParams& params = call.params;
  int64_t end = params.length;
  if (call.lengths.has_value()) {
    end = std::clamp<int64_t>(call.lengths->const_data_ptr<int32_t>()[batch], 0, end);
  }
  const int64_t query = end - params.q_len + token;
  int64_t begin = std::max<int64_t>(params.start, first_position(call.starts, batch));
  if (params.causal) end = std::min(end, query + 1);
  if (params.window > 0) begin = std::max(begin, query - params.window + 1);
  const bool* row = nullptr;
  if (mask.defined()) {
    const int64_t entry = params.mask_batch > 1 ? batch : 0, line = params.mask_rows > 1 ? token : 0;
    row = mask.const_data_ptr<bool>() + (entry * params.mask_rows + line) * (params.length - params.start);
  }
  return {begin, std::max(begin, end), row};
}

// Merges the parts of one row; returns the log-sum-exp. The one place where softmax results are put together.
float merge_parts(const float* outs, const float* sums, int64_t splits, int64_t head_dim, const float* sink,
                  float* out) {
  float largest = sink != nullptr ? *sink : -INFINITY;
  for (int64_t s = 0; s < splits; ++s) {
    if (sums[2 * s] != 0) largest = std::max(largest, sums[2 * s + 1]);
  }
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float total = sink != nullptr ? std::exp(*sink - shift) : 0.0f;
  std::fill(out, out + head_dim, 0.0f);
  for (int64_t s = 0; s < splits; ++s) {
    if (sums[2 * s] == 0) continue;
    const float weight = std::exp(sums[2 * s + 1] - shift);
    total += weight * sums[2 * s];
    for (int64_t i = 0; i < head_dim; ++i) out[i] += weight * outs[s * head_dim + i];
  }
  if (total != 0) {
    for (int64_t i = 0; i < head_dim; ++i) out[i] /= total;
  }
  return shift + std::log(total);
}

class CpuBackend final : public Backend {
 public:
  void rotate(const Tensor& x, bool inverse, const Tensor& out) const override {
    const Tensor input = x.to(at::kFloat).contiguous();
    const int64_t head_dim = x.size(-1), rows = x.numel() / head_dim;
    const float* from = input.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    parallel_for(rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      kernels().rotate(from + begin * head_dim, to + begin * head_dim, end - begin, head_dim, inverse, 1.0f);
    });
  }

  void encode(const EncodeCall& call) const override {
    const Kernels& run = kernels();
    const int64_t sides = static_cast<int64_t>(call.inputs.size());
    const Tensor& first = call.inputs[0].x;
    const int64_t heads = first.size(0) * first.size(1), head_dim = first.size(3);
    const EncodeParts parts(call, call.inputs[0].side.codes.size(2));
    std::vector<Tensor> rows;
    for (const EncodeCall::Input& input : call.inputs) {
      rows.push_back(input.x.stride(3) == 1 ? input.x : input.x.contiguous());
    }
    const int64_t tasks = sides * parts.count * heads;
    const int64_t tokens = std::max(parts.end - parts.begin, first.size(2));
    const int64_t task_numbers = std::max<int64_t>(1, sides * heads * tokens * head_dim / tasks);
    const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / task_numbers);
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      const bool has_blocks = call.block_size > 0 && parts.begin < parts.end;
      const std::unique_ptr<at::Half[]> gathered(has_blocks ? new at::Half[call.block_size * head_dim] : nullptr);
      for (int64_t index = begin; index < end; ++index) {
        // Sides in turn, as one may take longer. Then heads: their rows of one token usually lie side by side.
        const int64_t which = index % sides, head = index / sides % heads, part = index / sides / heads;
        const EncodeTask task = encode_task(call, call.inputs[which], rows[which], head);
        encode_part(run, call, task, parts, part, gathered.get());
      }
    });
  }

  void attend(const AttendCall& call) const override {
    const Kernels& run = kernels();
    const int64_t batch = call.q.size(0), heads = call.q.size(1), q_len = call.q.size(2), head_dim = call.q.size(3);
    const int64_t kv_heads = call.params.num_kv_heads, group = heads / kv_heads, rows = q_len * group;
    TqAttendParams params = call.params;
    // Rows of one KV head lie together: [batch, kv_heads, q_len, group, head_dim].
    Tensor q = call.q.to(at::kFloat);
    if (q_len > 1) q = q.reshape({batch, kv_heads, group, q_len, head_dim}).transpose(2, 3);
    q = q.contiguous();
    const Tensor mask = call.mask.has_value() ? call.mask->contiguous() : Tensor();
    const int64_t row_tiles = (rows + kMaxTaskRows - 1) / kMaxTaskRows;
    const int64_t tasks = batch * kv_heads * row_tiles;
    if (params.splits == 0) {
      int64_t positions = params.length - params.start;
      if (params.window > 0) positions = std::min<int64_t>(positions, params.window + params.q_len - 1);
      params.splits = static_cast<uint32_t>(cpu_splits(tasks, positions / 64, at::get_num_threads()));
    }
    const int64_t splits = params.splits;
    const int64_t numbers = batch * heads * q_len * head_dim, sums_size = batch * heads * q_len * splits * 2;
    const bool has_partials = call.partials.has_value();
    const Tensor scratch = at::empty({numbers + (has_partials ? 0 : numbers * splits + sums_size)}, q.options());
    float* queries = scratch.mutable_data_ptr<float>();
    float* outs = has_partials ? call.partials->mutable_data_ptr<float>() : queries + numbers;
    float* sums = outs + numbers * splits;
    const float* given = q.const_data_ptr<float>();
    parallel_for(batch * kv_heads * rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      const float* from = given + begin * head_dim;
      float* to = queries + begin * head_dim;
      if (call.rotate_q) {
        run.rotate(from, to, end - begin, head_dim, false, params.scale);
      } else {
        for (int64_t i = 0; i < (end - begin) * head_dim; ++i) to[i] = from[i] * params.scale;
      }
    });
    parallel_for(tasks * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t split = index % splits, task = index / splits;
        run_task(run, call, params, mask, queries, task / row_tiles, task % row_tiles * kMaxTaskRows, split, outs,
                 sums);
      }
    });
    finish(run, call, splits, outs, sums);
  }

  void decode(const DecodeCall& call) const override {
    const Kernels& run = kernels();
    const TqAttendParams& params = call.params;
    const int64_t positions = params.length - params.start, head_dim = params.head_dim;
    const int64_t heads = call.outs[0].size(0) * params.num_kv_heads;
    parallel_for(heads * static_cast<int64_t>(call.sides.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t which = task / heads, head = task % heads;
        float* out = call.outs[which].mutable_data_ptr<float>() + head * positions * head_dim;
        const HeadStore store = head_store(call.sides[which], head, call.starts);
        run.decode(store, params, params.start, params.length, out);
        const int64_t padding = std::clamp<int64_t>(store.first - params.start, 0, positions);
        std::fill(out, out + padding * head_dim, 0.0f);
        if (call.undo_rotation) run.rotate(out, out, positions, head_dim, true, 1.0f);
      }
    });
  }

  void reduce(const ReduceCall& call) const override {
    const float* outs = call.partials.const_data_ptr<float>();
    const float* sums = outs + call.rows * call.splits * call.head_dim;
    float* out = call.out.mutable_data_ptr<float>();
    for (int64_t row = 0; row < call.rows; ++row) {
      float* to = out + row * call.head_dim;
      merge_parts(outs + row * call.splits * call.head_dim, sums + row * call.splits * 2, call.splits, call.head_dim,
                  nullptr, to);
      if (call.undo_rotation) kernels().rotate(to, to, 1, call.head_dim, true, 1.0f);
    }
  }

 private:
  // Up to kMaxTaskRows rows, from `first_row` on, of one KV head, over one part of the positions.
  static void run_task(const Kernels& run, const AttendCall& call, const TqAttendParams& params, const Tensor& mask,
                       const float* queries, int64_t head, int64_t first_row, int64_t split, float* outs, float* sums) {
    const int64_t kv_heads = params.num_kv_heads, group = params.num_heads / kv_heads, head_dim = params.head_dim;
    const int64_t all_rows = params.q_len * group, splits = params.splits;
    int64_t row_begin[kMaxTaskRows], row_end[kMaxTaskRows];
    const bool* row_mask[kMaxTaskRows];
    AttendTask task{};
    task.params = &params;
    task.k = head_store(call.k, head, call.starts);
    task.v = head_store(call.v, head, call.starts);
    task.q = queries + (head * all_rows + first_row) * head_dim;
    task.rows = std::min(kMaxTaskRows, all_rows - first_row);
    task.digits = call.q.scalar_type() == at::kFloat ? 3 : 2;
    int64_t begin = params.length, end = 0;
    for (int64_t r = 0; r < task.rows; ++r) {
      const Visibility seen = visibility(call, mask, head / kv_heads, (first_row + r) / group);
      row_begin[r] = seen.begin;
      row_end[r] = seen.end;
      row_mask[r] = seen.mask;
      if (seen.begin < seen.end) {
        begin = std::min(begin, seen.begin);
        end = std::max(end, seen.end);
      }
    }
    const int64_t part = (std::max<int64_t>(end - begin, 0) + splits - 1) / splits;
    task.begin = std::min(begin + split * part, std::max(begin, end));
    task.end = std::min(task.begin + part, std::max(begin, end));
    task.row_begin = row_begin;
    task.row_end = row_end;
    task.row_mask = mask.defined() ? row_mask : nullptr;
    const int64_t row = (head * all_rows + first_row) * splits + split;
    task.out = outs + row * head_dim;
    task.sums = sums + row * 2;
    task.out_stride = splits * head_dim;
    task.sums_stride = splits * 2;
    run.attend(task);
  }

  // Merges the parts, undoes the rotation, and puts the rows where the caller wants them.
  static void finish(const Kernels& run, const AttendCall& call, int64_t splits, const float* outs, const float* sums) {
    const int64_t batch = call.q.size(0), heads = call.q.size(1), q_len = call.q.size(2), head_dim = call.q.size(3);
    const int64_t group = heads / call.params.num_kv_heads;
    const bool is_direct = call.out.scalar_type() == at::kFloat;
    const Tensor result = is_direct ? call.out : at::empty(call.out.sizes(), call.out.options().dtype(at::kFloat));
    const Tensor sinks = call.sinks.has_value() ? call.sinks->to(at::kFloat).contiguous() : Tensor();
    float* out = result.mutable_data_ptr<float>();
    float* lse = call.lse.has_value() ? call.lse->mutable_data_ptr<float>() : nullptr;
    parallel_for(batch * heads * q_len, kRowsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {  // in the order of outs: batch, KV head, token, head of the group
        const int64_t head_of_group = row % group, token = row / group % q_len, kv = row / (group * q_len);
        const int64_t head = kv * group + head_of_group;
        const int64_t to = head * q_len + token;
        const float* sink = sinks.defined() ? sinks.const_data_ptr<float>() + head % heads : nullptr;
        const float row_lse = merge_parts(outs + row * splits * head_dim, sums + row * splits * 2, splits, head_dim,
                                          sink, out + to * head_dim);
        if (lse != nullptr) lse[to] = row_lse;
        if (call.undo_rotation) run.rotate(out + to * head_dim, out + to * head_dim, 1, head_dim, true, 1.0f);
      }
    });
    if (!is_direct) call.out.copy_(result);
  }
};

const bool registered = [] {
  static const CpuBackend backend;
  register_backend(c10::DeviceType::CPU, &backend);
  return true;
}();

}  // namespace
}  // namespace tqattn::cpu
