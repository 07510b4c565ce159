// Where a position's numbers are, and decoding them.
// Part of kernels_impl.h: compiled once for each instruction set.

// How neighbouring positions of a cache are kept.
enum class Place { kSink, kCoded, kTail };

// Neighbouring positions that are kept alike, one behind the other, around the same mean.
struct Run {
  Place place;
  int64_t end;
};

// Rows of one side, `stride` bytes apart.
struct Span {
  const uint8_t* first;
  int64_t stride;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The run from `position` on, up to `end`.
Run find_run(const HeadStore& store, const TqAttendParams& params, int64_t position, int64_t end) {
  const int64_t sinks_end = store.first + params.sink_length;
  if (position >= store.first && position < sinks_end) return {Place::kSink, smaller(end, sinks_end)};
  if (position < store.first) end = smaller(end, store.first);
  if (params.block_size != 0 && position >= params.coded) {
    return {Place::kTail, smaller(end, (position / params.tail_slots + 1) * params.tail_slots)};
  }
  const int64_t unit = params.block_size != 0 ? params.block_size : params.slots;
  return {Place::kCoded, smaller(end, (position / unit + 1) * unit)};
}

// One side of the cache of one head.
class SideReader {
 public:
  SideReader(const HeadStore& store, const TqAttendParams& params) : store_(store), params_(params) {}

  bool is_half(Place place) const { return place != Place::kCoded || store_.codebook == nullptr; }

  // The rows from `position` on, to the end of its run.
  Span rows(Place place, int64_t position) const {
    const int64_t half_bytes = params_.head_dim * 2;
    if (place == Place::kCoded) return {store_.codes + position % params_.slots * store_.row_bytes, store_.row_bytes};
    const int64_t row =
        place == Place::kSink ? position - store_.first : params_.sink_length + position % params_.tail_slots;
    return {reinterpret_cast<const uint8_t*>(store_.tail) + row * half_bytes, half_bytes};
  }

  // The coded rows from `position` on, of which any padded_dim codes may be read: rows that have too few behind them
  // are copied to `buffer`.
  Span readable_rows(int64_t position, int64_t count, uint8_t* buffer) const {
    const Span span = rows(Place::kCoded, position);
    const int64_t behind = params_.slots - position % params_.slots - count;
    if (padded_dim(params_.head_dim) == params_.head_dim || behind * span.stride >= kCodes) return span;
    std::memcpy(buffer, span.first, count * span.stride);
    return {buffer, span.stride};
  }

  // The mean that the coded rows from `position` on are around, half precision; null if there is none.
  const uint8_t* mean(Place place, int64_t position) const {
    if (place != Place::kCoded || store_.means == nullptr) return nullptr;
    const c10::Half* row = store_.means + position % params_.slots / params_.block_size * params_.head_dim;
    // The next one comes too late for the processor to see a pattern.
    for (int64_t i = 0; i < params_.head_dim; i += 32) __builtin_prefetch(row + params_.head_dim + i);
    return reinterpret_cast<const uint8_t*>(row);
  }

  // What a row's numbers are to be multiplied with, besides norms: integers of a codebook with its scale.
  float scale(Place place) const { return is_half(place) ? 1.0f : store_.levels->factor; }

  // The norms of group `group` of `count` rows.
  void norms(Place place, int64_t position, int64_t count, int64_t group, float* out) const {
    if (is_half(place)) {
      for (int64_t j = 0; j < count; ++j) out[j] = 1.0f;
      return;
    }
    const int64_t groups = norm_groups(params_.head_dim);
    const float* stored = store_.norms + position % params_.slots * groups + group;
    if (groups == 1) {
      for (int64_t j = 0; j < count; ++j) out[j] = stored[j] * store_.norm_factor;
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = stored[j * groups] * store_.norm_factor;
    }
  }

  // Calls f with the class of the rows, as with_coded_rows does.
  template <typename Function>
  void with_rows(Place place, int digits, Function f) const {
    if (is_half(place)) return f(HalfRows{params_.head_dim});
    with_coded_rows(store_, params_.head_dim, digits, f);
  }

 private:
  const HeadStore& store_;
  const TqAttendParams& params_;
};

// A row's numbers in the rows' own order, without norms and means.
template <typename Rows>
TQ_INLINE void read_row(const Rows& rows, const uint8_t* row, int64_t head_dim, float* out) {
  rows.for_each_part(0, head_dim, [&](auto part, int64_t at) TQ_LAMBDA_INLINE {
    FloatVec x[part.kCount];
    part(row, x);
    for (int v = 0; v < part.kCount; ++v) store(out + at + v * kWidth, x[v]);
  });
}

void decode(const HeadStore& store, const TqAttendParams& params, int64_t begin, int64_t end, float* out) {
  const int64_t head_dim = params.head_dim;
  const SideReader side(store, params);
  for (int64_t position = begin; position < end;) {
    const Run run = find_run(store, params, position, end);
    const c10::Half* mean = reinterpret_cast<const c10::Half*>(side.mean(run.place, position));
    side.with_rows(run.place, kMaxDigits, [&](const auto& rows) {
      for (; position < run.end; ++position, out += head_dim) {
        alignas(64) float ordered[TQ_MAX_HEAD_DIM];
        uint8_t copy[TQ_MAX_HEAD_DIM + kCodes];
        const bool is_half = side.is_half(run.place);
        const Span span = is_half ? side.rows(run.place, position) : side.readable_rows(position, 1, copy);
        read_row(rows, span.first, head_dim, ordered);
        for (int64_t i = 0; i < head_dim; ++i) out[i] = 0.0f;
        rows.add_natural(ordered, out);
        for (int64_t from = 0; from < head_dim; from += TQ_NORM_GROUP) {
          float norm;
          side.norms(run.place, position, 1, from / TQ_NORM_GROUP, &norm);
          // The level first, as the format has it: a block's mean may be of the same size and cancel it.
          const int64_t to = smaller(head_dim, from + TQ_NORM_GROUP);
          for (int64_t i = from; i < to; ++i) out[i] = out[i] * side.scale(run.place) * norm;
        }
        for (int64_t i = 0; mean != nullptr && i < head_dim; ++i) out[i] += static_cast<float>(mean[i]);
      }
    });
  }
}
