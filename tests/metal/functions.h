// The functions of metal_stdlib that shaders may call, for both imitations of it. X(name, value for a float x or floats
// x, y, z): the strict check reads the names, execution the values too.
#pragma once

// Functions whose result depends on precise:: or fast::, so that shaders must choose.
#define MSL_CHOSEN_UNARY(X)     \
  X(cos, std::cos(x))           \
  X(exp, std::exp(x))           \
  X(exp2, std::exp2(x))         \
  X(log, std::log(x))           \
  X(log2, std::log2(x))         \
  X(rsqrt, 1.0f / std::sqrt(x)) \
  X(sin, std::sin(x))           \
  X(sqrt, std::sqrt(x))         \
  X(tanh, std::tanh(x))

#define MSL_CHOSEN_BINARY(X) \
  X(divide, x / y)           \
  X(pow, std::pow(x, y))     \
  X(powr, std::pow(x, y))

#define MSL_UNARY(X)                               \
  X(ceil, std::ceil(x))                            \
  X(fabs, std::fabs(x))                            \
  X(floor, std::floor(x))                          \
  X(fract, x - std::floor(x))                      \
  X(rint, std::rint(x))                            \
  X(round, std::round(x))                          \
  X(saturate, std::fmin(std::fmax(x, 0.0f), 1.0f)) \
  X(sign, float(x > 0.0f) - float(x < 0.0f))       \
  X(trunc, std::trunc(x))

#define MSL_BINARY(X)              \
  X(copysign, std::copysign(x, y)) \
  X(fmax, std::fmax(x, y))         \
  X(fmin, std::fmin(x, y))         \
  X(fmod, std::fmod(x, y))         \
  X(step, y < x ? 0.0f : 1.0f)

#define MSL_TERNARY(X)      \
  X(fma, std::fma(x, y, z)) \
  X(mix, x + (y - x) * z)
