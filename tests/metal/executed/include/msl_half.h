// half and bfloat: 16 bits, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace metal {

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}

inline uint16_t half_bits(float x) {
  const uint32_t bits = as_type<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // adding 0.5 leaves a multiple of 2^-24 in the last bits
    return uint16_t(sign | (as_type<uint32_t>(as_type<float>(magnitude) + 0.5f) - 0x3F000000));
  }
  return uint16_t(sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

inline float half_value(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7FFF) << 13, sign = uint32_t(bits & 0x8000) << 16;
  if (magnitude >= 0x0F800000) return as_type<float>(sign | 0x7F800000 | magnitude);
  return as_type<float>(sign | as_type<uint32_t>(as_type<float>(magnitude) * 0x1p112f));
}

class half {
 public:
  half() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>>
  explicit half(T x) : bits_(half_bits(float(x))) {}
  template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>>
  explicit operator T() const {
    return T(half_value(bits_));
  }

#define MSL_OPERATOR(op)                                                         \
  friend half operator op(half a, half b) { return half(float(a) op float(b)); } \
  friend half& operator op## = (half & a, half b) { return a = half(float(a) op float(b)); }
  MSL_OPERATOR(+)
  MSL_OPERATOR(-)
  MSL_OPERATOR(*)
  MSL_OPERATOR(/)
#undef MSL_OPERATOR
#define MSL_COMPARISON(op) \
  friend bool operator op(half a, half b) { return float(a) op float(b); }
  MSL_COMPARISON(==)
  MSL_COMPARISON(!=)
  MSL_COMPARISON(<)
  MSL_COMPARISON(<=)
  MSL_COMPARISON(>)
  MSL_COMPARISON(>=)
#undef MSL_COMPARISON
  friend half operator-(half a) { return half(-float(a)); }

 private:
  uint16_t bits_;
};

inline half operator""h(long double x) { return half(float(x)); }
inline half operator""h(unsigned long long x) { return half(float(x)); }

class bfloat {
 public:
  bfloat() = default;
  explicit bfloat(float x) {
    const uint32_t bits = as_type<uint32_t>(x);
    bits_ = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return as_type<float>(uint32_t(bits_) << 16); }

 private:
  uint16_t bits_;
};

}  // namespace metal
