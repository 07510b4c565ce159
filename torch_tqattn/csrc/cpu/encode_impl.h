// Coding of rotated rows.
// Part of kernels_impl.h: compiled once for each instruction set.

void pack(const uint8_t* codes, int64_t head_dim, const StorageFormat& format, uint8_t* row, int64_t row_bytes) {
  const int planes[2] = {format.low_plane, format.high_plane};
  std::memset(row, 0, row_bytes);
  int shift = 0;
  for (int plane : planes) {
    if (plane == 0) continue;
    const int mask = (1 << plane) - 1;
    for (int64_t i = 0; i < head_dim; ++i) {
      row[i * plane / 8] |= static_cast<uint8_t>(((codes[i] >> shift) & mask) << (i * plane % 8));
    }
    row += head_dim * plane / 8;
    shift += plane;
  }
}

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

// The multiplier of the scale with which the codes of x make the smallest angle with x; of equal ones the first.
float best_multiplier(const float* x, int64_t size, const Codebook& codebook) {
  float best = 1.0f, least = INFINITY;
  for (const float multiplier : kScaleMultipliers) {
    alignas(64) float levels[TQ_NORM_GROUP];  // over the codebook's scale, so that the sums of their steps are exact
    for (int64_t i = 0; i < size; ++i) levels[i] = codebook.integers[0];
    for (int t = 0; t < (1 << codebook.bits) - 1; ++t) {
      const float threshold = codebook.thresholds[t] * multiplier;
      const float step = codebook.integers[t + 1] - codebook.integers[t];
      for (int64_t i = 0; i < size; ++i) levels[i] += x[i] > threshold ? step : 0.0f;
    }
    // The squared length of x's part at right angles to its codes: that of what quantising at this scale left over,
    // less what another scale would still take off it. From x itself, float32 would lose the difference at 8 bits.
    FloatVec left = {}, along = {}, length = {};
    for (int64_t i = 0; i < size; i += kWidth) {
      const FloatVec level = load(levels + i) * codebook.scale;
      const FloatVec rest = load(x + i) - level * multiplier;
      left += rest * rest;
      along += rest * level;
      length += level * level;
    }
    const float error = sum_lanes(left) - sum_lanes(along) * sum_lanes(along) / sum_lanes(length);
    if (error < least) {
      best = multiplier;
      least = error;
    }
  }
  return best;
}

void encode_row(const float* row, int64_t head_dim, const HeadStore& store, int64_t slot, Encode encode) {
  if (store.codebook == nullptr) {
    c10::Half* dense = reinterpret_cast<c10::Half*>(store.codes) + slot * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) dense[i] = c10::Half(saturate_to_half(row[i]));
    return;
  }
  const Codebook& codebook = *store.codebook;
  uint8_t codes[TQ_MAX_HEAD_DIM];
  const int64_t groups = norm_groups(head_dim);
  const int64_t size = head_dim / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const float* x = row + group * size;
    const float rms = root_mean_square(x, size);
    const bool is_number = rms > 0;  // neither zero nor NaN
    alignas(64) float normalised[TQ_NORM_GROUP];
    alignas(64) int32_t index[TQ_NORM_GROUP] = {};
    for (int64_t i = 0; i < size; ++i) normalised[i] = is_number ? x[i] / rms : 0.0f;
    const float multiplier = is_number && encode == Encode::kBest ? best_multiplier(normalised, size, codebook) : 1.0f;
    for (int t = 0; t < (1 << codebook.bits) - 1; ++t) {
      const float threshold = codebook.thresholds[t] * multiplier;
      for (int64_t i = 0; i < size; ++i) index[i] += normalised[i] > threshold;
    }
    float norm = rms;
    if (is_number && encode != Encode::kPlain) {
      float sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += codebook.levels[index[i]] * codebook.levels[index[i]];
      norm = rms / std::sqrt(sum / size);
    }
    for (int64_t i = 0; i < size; ++i) codes[group * size + i] = static_cast<uint8_t>(index[i]);
    store.norms[slot * groups + group] = norm / store.norm_factor;
  }
  pack(codes, head_dim, *store.format, store.codes + slot * store.row_bytes, store.row_bytes);
}
