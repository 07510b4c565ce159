// The signed Hadamard transform.
// Part of kernels_impl.h: compiled once for each instruction set.

// Hadamard transform of a power-of-two number of elements, not normalised. Every stage has the same access pattern
// (neighbours in, halves out), which vectorises at all strides; after log2(count) stages the order is natural again.
// Returns the buffer that holds the result.
float* hadamard_power_of_two(float* from, float* to, int64_t count) {
  for (int64_t stage = 1; stage < count; stage *= 2) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = from[2 * i], b = from[2 * i + 1];
      to[i] = a + b;
      to[i + half] = a - b;
    }
    float* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

// Signs of the symmetric Hadamard matrix of order 12 or 20: a border of ones around Legendre symbols of i + j.
struct OddHadamard {
  float entry[20][20];
  explicit OddHadamard(int order) {
    const int q = order - 1;
    for (int i = 0; i < order; ++i) {
      for (int j = 0; j < order; ++j) {
        float value = 1.0f;
        if (i > 0 && j > 0) {
          value = -1.0f;
          for (int root = 1; root < q; ++root) {
            if (root * root % q == (i + j - 2) % q) value = 1.0f;
          }
        }
        entry[i][j] = value;
      }
    }
  }
};

int odd_order(int64_t head_dim) { return head_dim == 80 ? 20 : head_dim % 3 == 0 ? 12 : 1; }

void apply_signs(float* row, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; ++i) {
    row[i] = (kSignWords[i / 32] >> (i % 32)) & 1 ? -row[i] : row[i];
  }
}

void rotate(const float* in, float* out, int64_t rows, int64_t head_dim, bool inverse, float scale) {
  static const OddHadamard order12(12), order20(20);
  alignas(64) float buffers[2][TQ_MAX_HEAD_DIM];
  const int odd = odd_order(head_dim);
  const int64_t part = head_dim / odd;
  const float factor = scale / std::sqrt(static_cast<float>(head_dim));
  for (int64_t r = 0; r < rows; ++r) {
    float* row = buffers[0];
    std::memcpy(row, in + r * head_dim, head_dim * sizeof(float));
    if (!inverse) apply_signs(row, head_dim);
    if (odd == 1) {
      row = hadamard_power_of_two(buffers[0], buffers[1], head_dim);
    } else {
      const float (*matrix)[20] = odd == 12 ? order12.entry : order20.entry;
      const float* parts[20];
      for (int p = 0; p < odd; ++p) {
        parts[p] = hadamard_power_of_two(buffers[0] + p * part, buffers[1] + p * part, part);
      }
      alignas(64) float mixed[TQ_MAX_HEAD_DIM];
      for (int p = 0; p < odd; ++p) {
        for (int64_t i = 0; i < part; ++i) {
          float total = 0;
          for (int from = 0; from < odd; ++from) total += matrix[p][from] * parts[from][i];
          mixed[p * part + i] = total;
        }
      }
      row = buffers[0];
      std::memcpy(row, mixed, head_dim * sizeof(float));
    }
    if (inverse) apply_signs(row, head_dim);
    for (int64_t i = 0; i < head_dim; ++i) out[r * head_dim + i] = row[i] * factor;
  }
}
