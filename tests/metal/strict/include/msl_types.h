// Scalars, vectors, limits and address spaces.
#pragma once

#pragma clang diagnostic ignored "-Wuser-defined-literals"
#pragma clang diagnostic ignored "-Wundefined-inline"
#pragma clang diagnostic ignored "-Wundefined-internal"

#define MSL_DEVICE __attribute__((address_space(1)))
#define MSL_CONSTANT const __attribute__((address_space(2)))
#define MSL_THREADGROUP __attribute__((address_space(3)))

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;

constexpr half operator""h(long double x) { return half(x); }
constexpr half operator""h(unsigned long long x) { return half(x); }

#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXFLOAT FLT_MAX
#define INFINITY __builtin_inff()
#define NAN (INFINITY * 0.0f)
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u

#define MSL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(bool)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS

namespace metal {

template <class T, int N>
struct Vector {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <class T, int N>
using vec = typename Vector<T, N>::type;

// Vector constructors: one argument is copied to all components or converts a vector of the same size, of several the
// components add up, and vectors among them have the result's component type.
template <class T>
struct Shape {
  static constexpr int count = __is_arithmetic(T) || __is_same(T, half) || __is_same(T, bfloat) ? 1 : 0;
  typedef T component;
};
#define MSL_SHAPE(T, N)             \
  template <>                       \
  struct Shape<T##N> {              \
    static constexpr int count = N; \
    typedef T component;            \
  };
#define MSL_SHAPES(T) MSL_SHAPE(T, 2) MSL_SHAPE(T, 3) MSL_SHAPE(T, 4)
MSL_SHAPES(bool)
MSL_SHAPES(char)
MSL_SHAPES(uchar)
MSL_SHAPES(short)
MSL_SHAPES(ushort)
MSL_SHAPES(int)
MSL_SHAPES(uint)
MSL_SHAPES(long)
MSL_SHAPES(ulong)
MSL_SHAPES(half)
MSL_SHAPES(bfloat)
MSL_SHAPES(float)
#undef MSL_SHAPES
#undef MSL_SHAPE

template <class...>
struct Total {
  static constexpr int count = 0;
};
template <class First, class... Rest>
struct Total<First, Rest...> {
  static constexpr int count = Shape<First>::count + Total<Rest...>::count;
};
template <bool...>
struct Flags {};
template <class V, class... A>
struct Fits {
  static constexpr bool one = sizeof...(A) == 1 && (Total<A...>::count == 1 || Total<A...>::count == Shape<V>::count);
  template <class B>
  struct Piece {
    static constexpr bool fits =
        Shape<B>::count == 1 || __is_same(typename Shape<B>::component, typename Shape<V>::component);
  };
  static constexpr bool several = sizeof...(A) != 1 && Total<A...>::count == Shape<V>::count &&
                                  __is_same(Flags<true, Piece<A>::fits...>, Flags<Piece<A>::fits..., true>);
};
template <bool, class T>
struct EnableIf {};
template <class T>
struct EnableIf<true, T> {
  typedef T type;
};
template <class V, class... A>
constexpr typename EnableIf<Fits<V, A...>::one || Fits<V, A...>::several, V>::type make_vector(A...);

}  // namespace metal

template <class To, class From>
typename metal::EnableIf<sizeof(To) == sizeof(From), To>::type as_type(From);
