// Storing new tokens: rotated, around their block's mean, as codes and norms.
// Part of kernels_impl.h: compiled once for each instruction set.

// Rotated rows

// Rotates rows of any type and stride. Returns whether a number may be beyond half precision's range: it is then
// infinite, unless kSaturate says what finite numbers become.
template <int kHeadDim, bool kSaturate, typename In, typename Out>
bool rotate_rows(const In* in, int64_t stride, int64_t rows, Out* out) {
  // Rows of one head are often a page apart. The processor does not see them coming, and they share so few of the first
  // cache's sets that they would push each other out of it. What is behind the last one is the next block's, or
  // nothing, which a prefetch may name as well.
  constexpr int64_t kAhead = 16, kIntoSecondCache = 2;
  const float factor = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  constexpr int kSums = 4;  // that need not wait for each other
  FloatVec squares[kSums] = {};
  for (int64_t r = 0; r < rows; ++r, in += stride, out += kHeadDim) {
    const char* next = reinterpret_cast<const char*>(in + kAhead * stride);
    for (size_t i = 0; i < kHeadDim * sizeof(In); i += 64) __builtin_prefetch(next + i, 0, kIntoSecondCache);
    RowVecs<kHeadDim> row;
    signed_hadamard<kHeadDim>(in, true, row);
#pragma GCC unroll 16
    for (int i = 0; i < kHeadDim / kWidth; ++i) {
      const FloatVec x = row[i] * factor;
      squares[i % kSums] += x * x;
      put(out + i * kWidth, kSaturate ? saturate(x) : x);
    }
  }
  return !(sum_lanes(squares[0] + squares[1] + squares[2] + squares[3]) < TQ_HALF_MAX * TQ_HALF_MAX);
}

template <int kHeadDim, typename In, typename Out>
void rotate_rows(const In* in, int64_t stride, int64_t rows, Out* out) {
  const bool is_beyond = rotate_rows<kHeadDim, false>(in, stride, rows, out);
  if (is_beyond && !std::is_same_v<Out, float>) rotate_rows<kHeadDim, true>(in, stride, rows, out);  // hardly ever
}

template <typename In, typename Out>
void rotate_rows(const In* in, int64_t stride, int64_t rows, int64_t head_dim, Out* out) {
  switch (head_dim) {
#define CASE(dim) \
  case dim:       \
    return rotate_rows<dim>(in, stride, rows, out);
    TQ_HEAD_DIMS(CASE)
#undef CASE
  }
}

// The rotated rows of new tokens, from `position` on.
template <typename Out>
void rotate_new(const EncodeTask& task, int64_t position, int64_t rows, Out* out) {
  const int64_t offset = (position - task.position) * task.stride;
  switch (task.type) {
    case InputType::kFloat:
      return rotate_rows(static_cast<const float*>(task.x) + offset, task.stride, rows, task.head_dim, out);
    case InputType::kHalf:
      return rotate_rows(static_cast<const c10::Half*>(task.x) + offset, task.stride, rows, task.head_dim, out);
    case InputType::kBFloat16:
      return rotate_rows(static_cast<const c10::BFloat16*>(task.x) + offset, task.stride, rows, task.head_dim, out);
  }
}

TQ_INLINE c10::Half* tail_row(const EncodeTask& task, int64_t position) {
  return task.store.tail + (task.sink_length + position % task.tail_slots) * task.head_dim;
}

// The rotated rows of positions begin..end, rounded as the tail holds them; those before `first` are zeros.
void gather(const EncodeTask& task, int64_t begin, int64_t end, int64_t first, c10::Half* rows) {
  const int64_t head_dim = task.head_dim;
  const auto row = [&](int64_t position) { return rows + (position - begin) * head_dim; };
  int64_t position = begin;
  for (; position < end && position < task.position; ++position) {
    std::memcpy(row(position), tail_row(task, position), head_dim * sizeof(c10::Half));
  }
  if (position < end) rotate_new(task, position, end - position, row(position));
  std::memset(static_cast<void*>(rows), 0, (first - begin) * head_dim * sizeof(c10::Half));
}

// Means

TQ_INLINE bool is_finite(const c10::Half* row, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; ++i) {
    if ((row[i].x & 0x7c00) == 0x7c00) return false;
  }
  return true;
}

// Sums of the columns of those rows that have neither NaN nor infinities; returns how many these are.
int64_t sum_finite_rows(const c10::Half* rows, int64_t count, int64_t head_dim, float* sums) {
  int64_t counted = 0;
  std::memset(sums, 0, head_dim * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    const c10::Half* row = rows + r * head_dim;
    if (!is_finite(row, head_dim)) continue;
    for (int64_t i = 0; i < head_dim; i += kWidth) store(sums + i, load(sums + i) + load_number(row + i));
    ++counted;
  }
  return counted;
}

int64_t sum_rows(const c10::Half* rows, int64_t count, int64_t head_dim, float* sums) {
  constexpr int64_t kColumns = 4;  // vectors that are summed at once; all head dims are multiples of 16
  FloatVec spoilt = {};
  for (int64_t begin = 0; begin < head_dim;) {
    const int64_t columns = head_dim - begin >= kColumns * kWidth ? kColumns : 1;
    FloatVec total[kColumns] = {};
    for (int64_t r = 0; r < count; ++r) {
      const c10::Half* row = rows + r * head_dim + begin;
      if (columns == kColumns) {
        for (int64_t i = 0; i < kColumns; ++i) total[i] += load_number(row + i * kWidth);
      } else {
        total[0] += load_number(row);
      }
    }
    for (int64_t i = 0; i < columns; ++i, begin += kWidth) {
      store(sums + begin, total[i]);
      spoilt += total[i] * 0.0f;
    }
  }
  // Sums of finite halves are finite: 0 times them is 0.
  return sum_lanes(spoilt) == 0 ? count : sum_finite_rows(rows, count, head_dim, sums);
}

// Stores the mean of these rows, and returns it as it was stored.
void store_mean(const c10::Half* rows, int64_t count, int64_t head_dim, c10::Half* stored, float* mean) {
  const int64_t counted = sum_rows(rows, count, head_dim, mean);
  const float divisor = static_cast<float>(counted > 0 ? counted : 1);
  for (int64_t i = 0; i < head_dim; i += kWidth) {
    store_half(stored + i, saturate(load(mean + i) / divisor));
    store(mean + i, load_number(stored + i));
  }
}

// Codes

// sqrt(mean(x^2)), scaled by the largest number so that neither huge nor tiny ones leave float32. NaN for non-finite.
float root_mean_square(const float* x, int64_t count) {
  float peak = 0, sum = 0;
  bool is_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    peak = std::fabs(x[i]) > peak ? std::fabs(x[i]) : peak;
    is_finite &= std::isfinite(x[i]);
  }
  if (!is_finite) return std::numeric_limits<float>::quiet_NaN();
  if (peak == 0) return 0;
  for (int64_t i = 0; i < count; ++i) sum += (x[i] / peak) * (x[i] / peak);
  return peak * std::sqrt(sum / count);
}

// Normalises a group that is out of float32's comfortable range, in place; returns its root mean square.
float normalise(float* x, int64_t size) {
  const float rms = root_mean_square(x, size);
  for (int64_t i = 0; i < size; ++i) x[i] = rms > 0 ? x[i] / rms : 0.0f;
  return rms;
}

constexpr int64_t kBatchGroups = 16;  // coded at a time: a group alone would be a chain of instructions that wait

// Rows that are coded together, and the sums of their groups' squares, lane by lane.
struct Batch {
  alignas(64) float rows[kBatchGroups * TQ_NORM_GROUP];
  FloatVec squares[kBatchGroups] = {};
};

// Roots of sums of squares over `size` numbers.
TQ_INLINE void root_means(const FloatVec* squares, int64_t size, float* sums, float* roots) {
  sum_lanes_of_16(squares, sums);
  for (int64_t i = 0; i < kBatchGroups; i += kWidth) {
    store(roots + i, square_root(load(sums + i) / static_cast<float>(size)));
  }
}

// Codes `count` rows, of at most kBatchGroups groups together.
template <int kBits>
void encode_batch(const EncodeTask& task, const Quantiser<kBits>& quantiser, Batch& batch, int64_t count,
                  int64_t slot) {
  const HeadStore& to = task.store;
  const int64_t head_dim = task.head_dim, groups = norm_groups(head_dim), size = head_dim / groups;
  alignas(64) float sums[kBatchGroups], norms[kBatchGroups], lengths[kBatchGroups];
  alignas(64) uint8_t codes[kBatchGroups * TQ_NORM_GROUP];
  root_means(batch.squares, size, sums, norms);
  for (int64_t group = 0; group < count * groups; ++group) {
    float* x = batch.rows + group * size;
    float inverse = 1.0f / norms[group];
    if (!(sums[group] > 1e-20f && sums[group] < 1e30f)) {  // else, squares that became zero do not matter
      norms[group] = normalise(x, size);
      inverse = 1.0f;
    }
    if (task.encode == Encode::kBest && norms[group] > 0) inverse /= best_multiplier(quantiser, x, size, inverse);
    batch.squares[group] = quantise(quantiser, x, size, inverse, codes + group * size);
  }
  root_means(batch.squares, size, sums, lengths);
  for (int64_t group = 0; group < count * groups; ++group) {
    const bool keeps_length = task.encode != Encode::kPlain && norms[group] > 0;
    to.norms[slot * groups + group] = norms[group] / (keeps_length ? lengths[group] * to.norm_factor : to.norm_factor);
  }
  // Only now: reading codes that were just written, in pieces of another size, would wait for them. Rows of one plane
  // that have nothing between them are as one.
  const bool has_one_plane = to.format->high_plane == 0 && head_dim * to.format->low_plane == to.row_bytes * 8;
  const int64_t together = has_one_plane ? count : 1;
  for (int64_t row = 0; row < count; row += together) {
    pack(codes + row * head_dim, together * head_dim, *to.format, to.codes + (slot + row) * to.row_bytes,
         together * to.row_bytes);
  }
}

// A group's numbers to be coded, from halves if these are given, around their mean if there is one; of a hidden token
// zeros. Returns the sum of squares, lane by lane.
TQ_INLINE FloatVec centre(const c10::Half* halves, const float* mean, bool is_hidden, int64_t size, float* x) {
  FloatVec squares = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    FloatVec number = halves != nullptr ? load_number(halves + i) : load(x + i);
    if (mean != nullptr) number -= load(mean + i);
    if (is_hidden) number = FloatVec{};
    store(x + i, number);
    squares += number * number;
  }
  return squares;
}

// Codes positions begin..end, of which those before `first` are padding or sinks.
template <int kBits>
void encode_coded(const EncodeTask& task, int64_t begin, int64_t end, int64_t first, c10::Half* gathered) {
  const int64_t head_dim = task.head_dim, slot = begin % task.slots;
  const int64_t groups = norm_groups(head_dim), size = head_dim / groups, rows = kBatchGroups / groups;
  const Quantiser<kBits> quantiser(*task.store.codebook);
  alignas(64) float mean[TQ_MAX_HEAD_DIM];
  Batch batch;
  const bool has_mean = task.store.means != nullptr;
  if (task.block_size > 0) gather(task, begin, end, first, gathered);
  if (has_mean) {
    store_mean(gathered + (first - begin) * head_dim, end - first, head_dim,
               task.store.means + slot / task.block_size * head_dim, mean);
  }
  for (int64_t position = begin; position < end; position += rows) {
    const int64_t count = end - position < rows ? end - position : rows;
    if (task.block_size == 0) rotate_new(task, position, count, batch.rows);
    for (int64_t group = 0; group < count * groups; ++group) {
      const int64_t i = (position - begin) * head_dim + group * size;
      const c10::Half* halves = task.block_size > 0 ? gathered + i : nullptr;
      const bool is_hidden = position + group / groups < first;
      batch.squares[group] =
          centre(halves, has_mean ? mean + group % groups * size : nullptr, is_hidden, size, batch.rows + group * size);
    }
    encode_batch(task, quantiser, batch, count, slot + position - begin);
  }
}

void encode(const EncodeTask& task, int64_t begin, int64_t end, c10::Half* gathered) {
  const int64_t sinks_end = task.store.first + task.sink_length;
  const int64_t first = sinks_end < begin ? begin : sinks_end < end ? sinks_end : end;
  if (task.store.codebook == nullptr) {
    c10::Half* dense = reinterpret_cast<c10::Half*>(task.store.codes);
    return gather(task, begin, end, first, dense + begin % task.slots * task.head_dim);
  }
  switch (task.store.codebook->bits) {
#define CASE(bits) \
  case bits:       \
    return encode_coded<bits>(task, begin, end, first, gathered);
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
    CASE(8)
#undef CASE
  }
}

void store_dense(const EncodeTask& task, int64_t begin, int64_t end) {
  const int64_t sinks_end = task.store.first + task.sink_length;
  int64_t position = task.position > task.store.first ? task.position : task.store.first;
  for (; position < sinks_end && position < task.end; ++position) {
    rotate_new(task, position, 1, task.store.tail + (position - task.store.first) * task.head_dim);
  }
  for (position = begin; position < end; ++position) {
    c10::Half* waiting = tail_row(task, position);
    if (position < sinks_end) {
      std::memset(static_cast<void*>(waiting), 0, task.head_dim * sizeof(c10::Half));
    } else {
      rotate_new(task, position, 1, waiting);
    }
  }
}
