// Attention walks the positions in tiles, each within one run of rows that are kept alike. Rows are read where they are
// used: codes become levels in registers, and up to 4 queries that share the KV head use them there. For more queries
// a tile is decoded once into a small dense buffer, which stays in the first-level cache. Norms are left to the logits
// and the weights, which are far fewer than the numbers; and so are the block's means: q . mean is one more number for
// each query, and the block's total weight is the value mean's.
//
// Part of kernels_impl.h: compiled once for each instruction set.

constexpr int kDirectRows = 8;      // queries up to which reading codes again is cheaper than storing numbers
constexpr int kCopiedRow = 96;      // bytes of a row that may have to be copied: head_dim no multiple of kCodes
constexpr int kDenseFloats = 8192;  // 32 KiB: positions of a tile times dims

// Queries in groups as for_row_groups makes them, a group's vectors side by side: one address is enough to read them.
void interleave(const float* q, int64_t rows, int64_t head_dim, float* out) {
  for_row_groups(rows, [&](int64_t first, auto group) {
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      for (int64_t r = first; r < first + group; ++r, out += kWidth) store(out, load(q + r * head_dim + i));
    }
  });
}

// logits[r * kLogitRow + j] = q_r . row j, over dims from..to, for kRows queries; q is interleaved. For j from `count`
// on, up to a multiple of kColumns, logits are anything.
template <int kRows, typename Rows>
void score_rows(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const float* q, float* logits) {
  constexpr int kColumns = kRows == 3 ? 4 : 16 / kRows;
  for (int64_t j = 0; j < count; j += kColumns) {
    FloatVec sums[16];
    if constexpr (kRows == 3) sums[12] = sums[13] = sums[14] = sums[15] = FloatVec{};
    // Two rows at a time, which share what is loaded of q: loads would be the limit.
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; c += 2) {
      const uint8_t* row = span.first + smaller(j + c, count - 1) * span.stride;
      const uint8_t* next = span.first + smaller(j + c + 1, count - 1) * span.stride;
      FloatVec gathered[2][kRows] = {};
      rows.for_each_part(from, to, [&](auto part, int64_t at) TQ_LAMBDA_INLINE {
        FloatVec x[2][part.kCount];
        part(row, x[0]);
        part(next, x[1]);
        const float* at_q = q + at * kRows;
#pragma GCC unroll 4
        for (int v = 0; v < part.kCount; ++v) {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            FloatVec of_q = load(at_q + (v * kRows + r) * kWidth);
            keep(of_q);
            gathered[0][r] += x[0][v] * of_q;
            gathered[1][r] += x[1][v] * of_q;
          }
        }
      });
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sums[r * kColumns + c] = gathered[0][r];
        sums[r * kColumns + c + 1] = gathered[1][r];
      }
    }
    float totals[16];
    sum_lanes_of_16(sums, totals);
    for (int r = 0; r < kRows; ++r) std::memcpy(logits + r * kLogitRow + j, totals + r * kColumns, kColumns * 4);
  }
}

// out_r += sum_j weights[r * kLogitRow + j] * row j, over dims from..to, for kRows queries.
template <int kRows, typename Rows>
void add_rows(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const float* weights, float* out,
              int64_t out_stride) {
  rows.for_each_part(from, to, [&](auto part, int64_t at) TQ_LAMBDA_INLINE {
    FloatVec sums[kRows][part.kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < part.kCount; ++v) sums[r][v] = load(out + r * out_stride + at + v * kWidth);
    }
    const uint8_t* row = span.first;
    for (int64_t j = 0; j < count; ++j, row += span.stride) {
      FloatVec x[part.kCount];
      part(row, x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const FloatVec weight = broadcast(weights[r * kLogitRow + j]);
#pragma GCC unroll 4
        for (int v = 0; v < part.kCount; ++v) sums[r][v] += weight * x[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < part.kCount; ++v) store(out + r * out_stride + at + v * kWidth, sums[r][v]);
    }
  });
}

// -inf where a row may not see a position of the tile. Returns whether any row sees any.
bool hide_positions(const AttendTask& task, int64_t begin, int64_t count, int64_t padded, float* logits) {
  bool is_seen = false;
  for (int64_t r = 0; r < task.rows; ++r) {
    float* row = logits + r * kLogitRow;
    const bool* mask = task.row_mask != nullptr ? task.row_mask[r] + (begin - task.params->start) : nullptr;
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t position = begin + j;
      const bool is_visible =
          j < count && position >= task.row_begin[r] && position < task.row_end[r] && (mask == nullptr || mask[j]);
      if (is_visible) {
        is_seen = true;
      } else {
        row[j] = -INFINITY;
      }
    }
  }
  return is_seen;
}

// One task: see kernels.h.
class Attention {
 public:
  explicit Attention(const AttendTask& task)
      : task_(task),
        params_(*task.params),
        head_dim_(task.params->head_dim),
        padded_(padded_dim(task.params->head_dim)),
        has_coded_(task.params->block_size == 0 || task.begin < task.params->coded),
        keys_(task.k, *task.params),
        values_(task.v, *task.params),
        common_end_(task.row_mask == nullptr ? task.end : 0) {
    for (int64_t r = 0; r < task.rows; ++r) {
      std::memset(out(r), 0, head_dim_ * sizeof(float));
      task.sums[r * task.sums_stride] = 0.0f;
      task.sums[r * task.sums_stride + 1] = -INFINITY;
      common_begin_ = task.row_begin[r] > common_begin_ ? task.row_begin[r] : common_begin_;
      common_end_ = smaller(task.row_end[r], common_end_);
    }
    interleave(task.q, task.rows, head_dim_, q_);
    if (!has_coded_) return;
    keys_.with_rows(Place::kCoded, task.digits, [&](const auto& rows) {
      if constexpr (std::decay_t<decltype(rows)>::kIsInteger) {
        set_queries(rows, task, integers_);
      } else {
        float* ordered = coded_out_;  // not in use yet
        for (int64_t r = 0; r < task.rows; ++r) rows.order(task.q + r * head_dim_, ordered + r * padded_);
        interleave(ordered, task.rows, padded_, coded_q_);
      }
    });
    std::memset(coded_out_, 0, task.rows * padded_ * sizeof(float));
  }

  void run() {
    const int64_t tile = is_direct() ? kMaxTile : smaller(kMaxTile, kDenseFloats / padded_ / 16 * 16);
    int64_t end = task_.begin, run_end = task_.begin;
    for (int64_t begin = task_.begin; begin < task_.end; begin = end) {
      const Run run = find_run(task_.k, params_, begin, task_.end);
      end = smaller(run.end, begin + tile);
      if (begin >= run_end) score_mean(run.place, begin);
      run_end = run.end;
      attend_tile(run.place, begin, end, end == run_end);
    }
    if (!has_coded_) return;
    values_.with_rows(Place::kCoded, task_.digits, [&](const auto& rows) {
      for (int64_t r = 0; r < task_.rows; ++r) {
        if constexpr (std::decay_t<decltype(rows)>::kIsInteger) {
          rows.add_natural(coded_out_ + r * padded_, out(r), kWovenOrder);
        } else {
          rows.add_natural(coded_out_ + r * padded_, out(r));
        }
      }
    });
  }

 private:
  float* out(int64_t r) { return task_.out + r * task_.out_stride; }
  bool is_direct() const { return task_.rows <= kDirectRows; }

  // `q` is interleaved, of `q_dim` numbers in the rows' order.
  template <typename Rows>
  void score(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const float* q, int64_t q_dim,
             float* logits) {
    for_row_groups(task_.rows, [&](int64_t r, auto group) {
      score_rows<decltype(group)::value>(rows, span, count, from, to, q + r * q_dim, logits + r * kLogitRow);
    });
  }

  template <typename Rows>
  void add(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const float* weights, float* out,
           int64_t out_stride) {
    for_row_groups(task_.rows, [&](int64_t r, auto group) {
      add_rows<decltype(group)::value>(rows, span, count, from, to, weights + r * kLogitRow, out + r * out_stride,
                                       out_stride);
    });
  }

  // The tile's rows, decoded into the dense buffer in their own order.
  template <typename Rows>
  Span densify(const Rows& rows, Span span, int64_t count) {
    for (int64_t j = 0; j < count; ++j) read_row(rows, span.first + j * span.stride, head_dim_, dense_ + j * padded_);
    return {reinterpret_cast<const uint8_t*>(dense_), padded_ * 4};
  }

  // What only makes sense in floats: weights that are none, infinite or negative.
  template <typename Rows>
  void add_one_by_one(const Rows& rows, Span span, int64_t count, int64_t from, int64_t to, const float* weights) {
    for (int64_t j = 0; j < count; ++j) {
      float* ordered = dense_;
      float* row = dense_ + padded_;
      read_row(rows, span.first + j * span.stride, head_dim_, ordered);
      std::memset(row, 0, head_dim_ * sizeof(float));
      rows.add_natural(ordered, row);
      add_where_seen(row, from, to, weights + j);
    }
  }

  // One value, for the queries that give it weight: kLogitRow apart.
  void add_where_seen(const float* row, int64_t from, int64_t to, const float* weights) {
    for (int64_t r = 0; r < task_.rows; ++r) {
      const float weight = weights[r * kLogitRow];
      for (int64_t i = from; weight != 0 && i < to; ++i) out(r)[i] += weight * row[i];
    }
  }

  // Half-precision rows of values, with zeros for those that not all queries may see and that have no finite numbers:
  // a weight of zero times NaN is NaN. They are added to the queries that see them.
  Span copy_finite(Span span, int64_t count, int64_t from, int64_t to, const float* weights) {
    for (int64_t j = 0; j < count; ++j) {
      float* row = dense_ + j * head_dim_;
      FloatVec spoilt = {};
      read_row(HalfRows{head_dim_}, span.first + j * span.stride, head_dim_, row);
      for (int64_t i = 0; i < head_dim_; i += kWidth) spoilt += load(row + i) * 0.0f;
      if (sum_lanes(spoilt) == 0) continue;
      add_where_seen(row, from, to, weights + j);
      std::memset(row, 0, head_dim_ * sizeof(float));
    }
    return {reinterpret_cast<const uint8_t*>(dense_), head_dim_ * 4};
  }

  void score_mean(Place place, int64_t position) {
    const c10::Half* mean = reinterpret_cast<const c10::Half*>(keys_.mean(place, position));
    for (int64_t r = 0; r < task_.rows; ++r) {
      FloatVec sum = {};
      const float* q = task_.q + r * head_dim_;
      for (int64_t i = 0; mean != nullptr && i < head_dim_; i += kWidth) sum += load(q + i) * load_number(mean + i);
      mean_logits_[r] = sum_lanes(sum);
    }
  }

  // Dot products of the queries with one norm group of the tile's keys, without norms.
  void score_group(Place place, int64_t begin, int64_t count, int64_t from, float* logits) {
    const int64_t to = smaller(head_dim_, from + TQ_NORM_GROUP);
    if (keys_.is_half(place)) {
      return score(HalfRows{head_dim_}, keys_.rows(place, begin), count, from, to, q_, head_dim_, logits);
    }
    const Span span = keys_.readable_rows(begin, count, copied_);
    with_coded_rows(task_.k, head_dim_, task_.digits, [&](const auto& rows) {
      if constexpr (std::decay_t<decltype(rows)>::kIsInteger) {
        score_integers(rows, span, count, from, to, task_, integers_, logits);
      } else if (is_direct()) {
        score(rows, span, count, from, to, coded_q_, padded_, logits);
      } else {
        const int64_t padded_to = to == head_dim_ ? padded_ : to;
        score(FloatRows{padded_}, densify(rows, span, count), count, from, padded_to, coded_q_, padded_, logits);
      }
    });
  }

  void add_group(Place place, int64_t begin, int64_t count, int64_t from, bool is_common, const float* weights) {
    const int64_t to = smaller(head_dim_, from + TQ_NORM_GROUP);
    if (values_.is_half(place)) {
      const Span span = values_.rows(place, begin);
      if (is_common) {
        add(HalfRows{head_dim_}, span, count, from, to, weights, task_.out, task_.out_stride);
        return;
      }
      const int64_t fit = kDenseFloats / head_dim_;
      for (int64_t j = 0; j < count; j += fit) {
        const Span part = {span.first + j * span.stride, span.stride};
        const int64_t rows = smaller(count - j, fit);
        add(FloatRows{head_dim_}, copy_finite(part, rows, from, to, weights + j), rows, from, to, weights + j,
            task_.out, task_.out_stride);
      }
      return;
    }
    const Span span = values_.readable_rows(begin, count, copied_);
    with_coded_rows(task_.v, head_dim_, task_.digits, [&](const auto& rows) {
      if constexpr (std::decay_t<decltype(rows)>::kIsInteger) {
        if (!add_integers(rows, span, count, from, to, task_, weights, integers_, coded_out_, padded_)) {
          add_one_by_one(rows, span, count, from, to, weights);
        }
      } else if (is_direct()) {
        add(rows, span, count, from, to, weights, coded_out_, padded_);
      } else {
        const int64_t padded_to = to == head_dim_ ? padded_ : to;
        add(FloatRows{padded_}, densify(rows, span, count), count, from, padded_to, weights, coded_out_, padded_);
      }
    });
  }

  // Logits of positions begin..begin + count to logits_; what is after them up to `padded` is anything.
  void score_tile(Place place, int64_t begin, int64_t count, int64_t padded) {
    for (int64_t from = 0; from < head_dim_; from += TQ_NORM_GROUP) {
      float* products = from == 0 ? logits_ : weights_;
      score_group(place, begin, count, from, products);
      alignas(64) float norms[kMaxTile] = {};
      keys_.norms(place, begin, count, from / TQ_NORM_GROUP, norms);
      const float scale = keys_.scale(place);
      for (int64_t r = 0; r < task_.rows; ++r) {
        const FloatVec before = broadcast(mean_logits_[r]);
        for (int64_t j = 0; j < padded; j += kWidth) {
          const int64_t at = r * kLogitRow + j;
          store(logits_ + at,
                load(products + at) * (load(norms + j) * scale) + (from == 0 ? before : load(logits_ + at)));
        }
      }
    }
    if (params_.softcap > 0) {
      for (int64_t r = 0; r < task_.rows; ++r) {
        float* row = logits_ + r * kLogitRow;
        for (int64_t j = 0; j < count; ++j) row[j] = params_.softcap * std::tanh(row[j] / params_.softcap);
      }
    }
  }

  // Logits to weights; updates the rows' sums and maxima and rescales what has been gathered so far, the weight of the
  // block's mean included. Each step is done for all rows, which need not wait for each other.
  void softmax(int64_t padded) {
    float old_max[kMaxTaskRows], shift[kMaxTaskRows];
    FloatVec totals[kMaxTaskRows];
    for (int64_t r = 0; r < task_.rows; ++r) {
      FloatVec largest = broadcast(-INFINITY);
      for (int64_t j = 0; j < padded; j += kWidth) largest = max(load(logits_ + r * kLogitRow + j), largest);
      float& row_max = task_.sums[r * task_.sums_stride + 1];
      const float tile_max = max_lanes(largest);
      old_max[r] = row_max;
      row_max = tile_max > row_max ? tile_max : row_max;
      shift[r] = row_max == -INFINITY ? 0.0f : row_max;  // a row that has seen nothing yet
    }
    for (int64_t r = 0; r < task_.rows; ++r) {
      totals[r] = FloatVec{};
      for (int64_t j = 0; j < padded; j += kWidth) {
        float* at = logits_ + r * kLogitRow + j;
        const FloatVec weight = exp_negative(load(at) - shift[r]);
        store(at, weight);
        totals[r] += weight;
      }
    }
    for (int64_t r = 0; r < task_.rows; ++r) {
      float& sum = task_.sums[r * task_.sums_stride];
      const float added = sum_lanes(totals[r]);
      if (task_.sums[r * task_.sums_stride + 1] != old_max[r]) rescale(r, std::exp(old_max[r] - shift[r]));
      sum += added;
      mean_weights_[r] += added;
    }
  }

  void rescale(int64_t r, float decay) {
    task_.sums[r * task_.sums_stride] *= decay;
    mean_weights_[r] *= decay;
    float* coded = coded_out_ + r * padded_;
    for (int64_t i = 0; i < head_dim_; i += kWidth) store(out(r) + i, load(out(r) + i) * decay);
    for (int64_t i = 0; has_coded_ && i < padded_; i += kWidth) store(coded + i, load(coded + i) * decay);
  }

  // weights_ = the softmax's weights times the norms of one group of values.
  void weigh(Place place, int64_t begin, int64_t count, int64_t padded, int64_t group) {
    alignas(64) float norms[kMaxTile] = {};
    values_.norms(place, begin, count, group, norms);
    const float scale = values_.scale(place);
    for (int64_t r = 0; r < task_.rows; ++r) {
      for (int64_t at = r * kLogitRow, j = 0; j < padded; at += kWidth, j += kWidth) {
        const FloatVec weight = load(logits_ + at);
        // What a query may not see has no weight, even if its norm is NaN.
        store(weights_ + at, weight != 0.0f ? weight * (load(norms + j) * scale) : FloatVec{});
      }
    }
  }

  void attend_tile(Place place, int64_t begin, int64_t end, bool ends_run) {
    const int64_t count = end - begin, padded = (count + 15) / 16 * 16;
    score_tile(place, begin, count, padded);
    bool is_seen = true;
    const bool is_common = begin >= common_begin_ && end <= common_end_ && count == padded;
    if (!is_common) is_seen = hide_positions(task_, begin, count, padded, logits_);
    if (is_seen) {
      softmax(padded);
      for (int64_t from = 0; from < head_dim_; from += TQ_NORM_GROUP) {
        weigh(place, begin, count, padded, from / TQ_NORM_GROUP);
        add_group(place, begin, count, from, is_common, weights_);
      }
    }
    if (ends_run) add_mean(place, begin);
  }

  // A block's mean is one more value, with the weight of all its positions.
  void add_mean(Place place, int64_t position) {
    const uint8_t* mean = values_.mean(place, position);
    if (mean != nullptr) {
      for (int64_t r = 0; r < task_.rows; ++r) weights_[r * kLogitRow] = mean_weights_[r];
      add(HalfRows{head_dim_}, {mean, 0}, 1, 0, head_dim_, weights_, task_.out, task_.out_stride);
    }
    std::memset(mean_weights_, 0, sizeof(mean_weights_));
  }

  const AttendTask& task_;
  const TqAttendParams& params_;
  const int64_t head_dim_;
  const int64_t padded_;  // dims in the order of coded rows
  const bool has_coded_;  // whether any of the positions may be coded
  const SideReader keys_;
  const SideReader values_;
  // Positions that every row sees, so that nothing need be hidden.
  int64_t common_begin_ = 0;
  int64_t common_end_;
  float mean_logits_[kMaxTaskRows];
  float mean_weights_[kMaxTaskRows] = {};
  alignas(64) float logits_[kMaxTaskRows * kLogitRow];
  alignas(64) float weights_[kMaxTaskRows * kLogitRow];
  alignas(64) float q_[kMaxTaskRows * TQ_MAX_HEAD_DIM];  // interleaved
  // Queries (interleaved) and results in the order of the coded keys' and values' numbers.
  alignas(64) float coded_q_[kMaxTaskRows * TQ_MAX_HEAD_DIM];
  alignas(64) float coded_out_[kMaxTaskRows * TQ_MAX_HEAD_DIM];
  alignas(64) float dense_[kDenseFloats];
  IntegerProducts integers_;
  uint8_t copied_[kMaxTile * kCopiedRow + kCodes];
};

void attend(const AttendTask& task) { Attention(task).run(); }
