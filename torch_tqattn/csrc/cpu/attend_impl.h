// Attention walks the positions in tiles, each within one block. A tile's keys (then values) are decoded once into a
// small dense buffer, and every query that shares the KV head uses it: plain dense attention on a tile that stays in
// the first-level cache. Norms are left to the logits and the weights, which are far fewer than the numbers; and so are
// the block's means: q . mean is one more number for each query, and the block's total weight is the value mean's.
//
// Part of kernels_impl.h: compiled once for each instruction set.

constexpr int kMaxTile = 64;
constexpr int kTileFloats = 8192;         // 32 KiB: positions a tile times head_dim
constexpr int kLogitRow = kMaxTile + 16;  // from one row's logits to the next one's: a mean may follow the positions

int64_t tile_positions(int64_t head_dim) {
  const int64_t fit = kTileFloats / head_dim / 16 * 16;
  return fit < kMaxTile ? fit : kMaxTile;
}

// logits[r][j] = q_r . k_j for kRows rows and all positions of a tile; `count` is a multiple of kColumns.
template <int kRows>
void score_rows(const float* q, const float* keys, int64_t count, int64_t head_dim, float* logits) {
#if defined(TQ_ISA_AVX2)
  constexpr int kColumns = 2;  // 16 registers hold 8 sums and what they are made of
#else
  constexpr int kColumns = 4;
#endif
  for (int64_t j = 0; j < count; j += kColumns) {
    FloatVec sums[16] = {};
    const float* key = keys + j * head_dim;
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      FloatVec k[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) k[c] = load(key + c * head_dim + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const FloatVec x = load(q + r * head_dim + i);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] += x * k[c];
      }
    }
    float totals[16];
    sum_lanes_of_16(sums, totals);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) logits[r * kLogitRow + j + c] = totals[r * kColumns + c];
    }
  }
}

// logits[r] = q_r . mean for kRows rows.
template <int kRows>
void score_mean(const float* q, const float* mean, int64_t head_dim, float* logits) {
  FloatVec sums[16] = {};
  for (int64_t i = 0; i < head_dim; i += kWidth) {
    const FloatVec x = load(mean + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] += load(q + r * head_dim + i) * x;
  }
  float totals[16];
  sum_lanes_of_16(sums, totals);
  for (int r = 0; r < kRows; ++r) logits[r] = totals[r];
}

// out_r += sum_j weights[r][j] v_j.
template <int kRows>
void add_values(const float* weights, const float* values, int64_t count, int64_t head_dim, float* out,
                int64_t out_stride) {
#if defined(TQ_ISA_AVX2)
  constexpr int kColumns = 2;
#else
  constexpr int kColumns = 4;
#endif
  const auto columns = [&](int64_t i, auto column_count) TQ_LAMBDA_INLINE {
    constexpr int kCount = decltype(column_count)::value;
    FloatVec sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCount; ++c) sums[r][c] = load(out + r * out_stride + i + c * kWidth);
    }
    for (int64_t j = 0; j < count; ++j) {
      FloatVec v[kCount];
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) v[c] = load(values + j * head_dim + i + c * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const FloatVec w = broadcast(weights[r * kLogitRow + j]);
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) sums[r][c] += w * v[c];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kCount; ++c) store(out + r * out_stride + i + c * kWidth, sums[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + kColumns * kWidth <= head_dim; i += kColumns * kWidth) {
    columns(i, std::integral_constant<int, kColumns>());
  }
  for (; i < head_dim; i += kWidth) columns(i, std::integral_constant<int, 1>());
}

// Calls function with std::integral_constant<int, rows in this group> for groups of at most 4 rows.
template <typename Function>
void for_row_groups(int64_t rows, Function function) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) function(r, std::integral_constant<int, 4>());
  if (rows - r == 3) function(r, std::integral_constant<int, 3>());
  if (rows - r == 2) function(r, std::integral_constant<int, 2>());
  if (rows - r == 1) function(r, std::integral_constant<int, 1>());
}

// Logits of one row to weights; updates the row's sum and maximum and rescales what it has gathered so far, the weight
// of its block's mean included.
void softmax_row(float* logits, int64_t padded, float* sums, float* out, int64_t head_dim, float* mean_weight) {
  FloatVec largest = broadcast(-INFINITY);
  for (int64_t j = 0; j < padded; j += kWidth) largest = max(load(logits + j), largest);
  const float old_max = sums[1];
  const float tile_max = max_lanes(largest);
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float shift = new_max == -INFINITY ? 0.0f : new_max;  // a row that has seen nothing yet
  FloatVec total = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const FloatVec weight = exp_negative(load(logits + j) - shift);
    store(logits + j, weight);
    total += weight;
  }
  const float decay = old_max == new_max ? 1.0f : std::exp(old_max - shift);
  const float added = sum_lanes(total);
  sums[0] = sums[0] * decay + added;
  *mean_weight = *mean_weight * decay + added;
  sums[1] = new_max;
  if (decay != 1.0f) {
    for (int64_t i = 0; i < head_dim; i += kWidth) store(out + i, load(out + i) * decay);
  }
}

// -inf where a row may not see a position of the tile. Returns a bit for each position that some row sees.
uint64_t hide_positions(const AttendTask& task, int64_t begin, int64_t count, int64_t padded, float* logits) {
  uint64_t seen = 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    float* row = logits + r * kLogitRow;
    const bool* mask = task.row_mask != nullptr ? task.row_mask[r] + (begin - task.params->start) : nullptr;
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t position = begin + j;
      const bool is_visible =
          j < count && position >= task.row_begin[r] && position < task.row_end[r] && (mask == nullptr || mask[j]);
      if (is_visible) {
        seen |= uint64_t{1} << j;
      } else {
        row[j] = -INFINITY;
      }
    }
  }
  return seen;
}

void attend(const AttendTask& task) {
  const TqAttendParams& params = *task.params;
  const int64_t head_dim = params.head_dim;
  const int64_t tile = tile_positions(head_dim);
  alignas(64) float dense[kTileFloats + TQ_MAX_HEAD_DIM];
  alignas(64) float logits[kMaxTaskRows * kLogitRow];
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memset(task.out + r * task.out_stride, 0, head_dim * sizeof(float));
    task.sums[r * task.sums_stride] = 0.0f;
    task.sums[r * task.sums_stride + 1] = -INFINITY;
  }
  // Positions that every row sees, so that nothing need be hidden.
  int64_t common_begin = 0, common_end = task.row_mask == nullptr ? task.end : 0;
  for (int64_t r = 0; r < task.rows; ++r) {
    common_begin = task.row_begin[r] > common_begin ? task.row_begin[r] : common_begin;
    common_end = task.row_end[r] < common_end ? task.row_end[r] : common_end;
  }
  RowDecoder keys(task.k, params), values(task.v, params);
  float mean_logits[kMaxTaskRows];  // of the run that ends at run_end
  float mean_weights[kMaxTaskRows] = {};
  int64_t end = task.begin, run_end = task.begin;
  for (int64_t begin = task.begin; begin < task.end; begin = end) {
    const Run run = keys.run(begin, task.end);
    end = run.end - begin < tile ? run.end : begin + tile;
    const int64_t count = end - begin;
    const int64_t padded = (count + 15) / 16 * 16;
    alignas(64) float factors[kMaxTile];
    for (int64_t j = 0; j < count; ++j) factors[j] = keys.numbers(run.place, begin + j, dense + j * head_dim);
    std::memset(dense + count * head_dim, 0, (padded - count) * head_dim * sizeof(float));
    std::memset(factors + count, 0, (padded - count) * sizeof(float));
    for_row_groups(task.rows, [&](int64_t r, auto group) {
      score_rows<decltype(group)::value>(task.q + r * head_dim, dense, padded, head_dim, logits + r * kLogitRow);
    });
    if (begin >= run_end) {
      const float* mean = keys.mean(run.place, begin);
      if (mean == nullptr) std::memset(mean_logits, 0, sizeof(mean_logits));
      for_row_groups(mean != nullptr ? task.rows : 0, [&](int64_t r, auto group) {
        score_mean<decltype(group)::value>(task.q + r * head_dim, mean, head_dim, mean_logits + r);
      });
      run_end = run.end;
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      float* row = logits + r * kLogitRow;
      const FloatVec of_mean = broadcast(mean_logits[r]);
      for (int64_t j = 0; j < padded; j += kWidth) store(row + j, load(row + j) * load(factors + j) + of_mean);
      if (params.softcap > 0) {
        for (int64_t j = 0; j < count; ++j) row[j] = params.softcap * std::tanh(row[j] / params.softcap);
      }
    }
    uint64_t seen = ~uint64_t{0};
    const bool is_common = begin >= common_begin && end <= common_end && count == padded;
    if (!is_common) seen = hide_positions(task, begin, count, padded, logits);
    const bool ends_run = end == run.end;
    if (seen == 0 && !ends_run) continue;
    for (int64_t j = 0; j < count; ++j) {
      if ((seen >> j) & 1) {
        factors[j] = values.numbers(run.place, begin + j, dense + j * head_dim);
      } else {  // a weight of zero times whatever lies there may be NaN
        std::memset(dense + j * head_dim, 0, head_dim * sizeof(float));
        factors[j] = 0.0f;
      }
    }
    // A block's mean is one more value of its last tile, with the weight of all its positions.
    const float* value_mean = ends_run ? values.mean(run.place, begin) : nullptr;
    if (value_mean != nullptr) std::memcpy(dense + count * head_dim, value_mean, head_dim * sizeof(float));
    for (int64_t r = 0; r < task.rows; ++r) {
      float* row = logits + r * kLogitRow;
      softmax_row(row, padded, task.sums + r * task.sums_stride, task.out + r * task.out_stride, head_dim,
                  &mean_weights[r]);
      for (int64_t j = 0; j < padded; j += kWidth) store(row + j, load(row + j) * load(factors + j));
      if (ends_run) {
        row[count] = mean_weights[r];
        mean_weights[r] = 0.0f;
      }
    }
    const int64_t value_count = value_mean != nullptr ? count + 1 : count;
    for_row_groups(task.rows, [&](int64_t r, auto group) {
      add_values<decltype(group)::value>(logits + r * kLogitRow, dense, value_count, head_dim,
                                         task.out + r * task.out_stride, task.out_stride);
    });
  }
}
