// Odd polynomials that guess where a number lies among a codebook's thresholds: at each of them they are within 0.25 of
// its index, as counted from the middle one, so that the nearest integer names the only threshold that a number has
// still to be compared with. csrc/format.cpp asserts that; they were fitted by least squares.
#pragma once

template <int bits, typename Number>
constexpr Number tq_guess(Number x) {
  const Number square = x * x;
  if (bits == 2) return x * 1.0186f;
  if (bits == 3) return x * (2.0138f - square * 0.097948f);
  if (bits == 4) return x * (3.8026f - square * 0.15659f);
  if (bits == 5) return x * (7.3434f - square * 0.26795f);
  if (bits == 6) return x * (14.811f - square * (0.71896f - square * 0.01919f));
  return x * (58.907f - square * (3.0608f - square * (0.11406f - square * 0.0018701f)));
}
