// Vectors: constructors, operators, and the swizzles in use.
#pragma once

#include "msl_half.h"

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

template <class T, int N>
struct vec;

template <class T>
struct is_scalar : std::integral_constant<bool, std::is_arithmetic<T>::value || std::is_same<T, half>::value ||
                                                    std::is_same<T, bfloat>::value> {};

// The named components `first` to `first + N - 1` of a vector, as a member of its union.
template <class T, int N, int first>
struct Part {
  T v[first + N];
  operator vec<T, N>() const {
    vec<T, N> result;
    for (int i = 0; i < N; ++i) result[i] = v[first + i];
    return result;
  }
  Part& operator=(vec<T, N> x) {
    for (int i = 0; i < N; ++i) v[first + i] = x[i];
    return *this;
  }
  Part& operator=(const Part& x) { return *this = vec<T, N>(x); }
};

template <class T, int N>
struct Components;
template <class T>
struct alignas(2 * sizeof(T)) Components<T, 2> {
  union {
    T v[2];
    struct {
      T x, y;
    };
    Part<T, 2, 0> xy;
  };
};
template <class T>
struct alignas(4 * sizeof(T)) Components<T, 3> {
  union {
    T v[4];
    struct {
      T x, y, z;
    };
    Part<T, 2, 0> xy;
    Part<T, 2, 1> yz;
    Part<T, 3, 0> xyz;
  };
};
template <class T>
struct alignas(4 * sizeof(T)) Components<T, 4> {
  union {
    T v[4];
    struct {
      T x, y, z, w;
    };
    Part<T, 2, 0> xy;
    Part<T, 2, 2> zw;
    Part<T, 3, 0> xyz;
    Part<T, 3, 1> yzw;
    Part<T, 4, 0> xyzw;
  };
};

template <class T>
struct Count : std::integral_constant<int, is_scalar<T>::value ? 1 : 0> {};
template <class T, int N>
struct Count<vec<T, N>> : std::integral_constant<int, N> {};
template <class T, int N, int first>
struct Count<Part<T, N, first>> : std::integral_constant<int, N> {};

template <class T, int N>
struct vec : Components<T, N> {
  using Components<T, N>::v;

  vec() = default;
  vec(const vec& other) {
    for (int i = 0; i < N; ++i) v[i] = other.v[i];
  }
  template <class U, class = std::enable_if_t<is_scalar<U>::value>>
  vec(U all) {
    for (int i = 0; i < N; ++i) v[i] = T(all);
  }
  template <class U>
  explicit vec(vec<U, N> other) {
    for (int i = 0; i < N; ++i) v[i] = T(other.v[i]);
  }
  template <class A, class B, class... Rest>
  vec(A a, B b, Rest... rest) {
    static_assert(Count<A>::value + Count<B>::value + (0 + ... + Count<Rest>::value) == N,
                  "wrong number of components");
    int next = 0;
    append(next, a);
    append(next, b);
    (append(next, rest), ...);
  }
  vec& operator=(const vec& other) {
    for (int i = 0; i < N; ++i) v[i] = other.v[i];
    return *this;
  }
  T& operator[](uint i) { return v[i]; }
  const T& operator[](uint i) const { return v[i]; }

#define MSL_OPERATOR(op)                                      \
  friend vec operator op(vec a, vec b) {                      \
    for (int i = 0; i < N; ++i) a.v[i] = T(a.v[i] op b.v[i]); \
    return a;                                                 \
  }                                                           \
  friend vec& operator op## = (vec & a, vec b) { return a = a op b; }
  MSL_OPERATOR(+)
  MSL_OPERATOR(-)
  MSL_OPERATOR(*)
  MSL_OPERATOR(/)
  MSL_OPERATOR(%)
  MSL_OPERATOR(&)
  MSL_OPERATOR(|)
  MSL_OPERATOR(^)
  MSL_OPERATOR(<<)
  MSL_OPERATOR(>>)
#undef MSL_OPERATOR
#define MSL_COMPARISON(op)                                    \
  friend vec<bool, N> operator op(vec a, vec b) {             \
    vec<bool, N> result;                                      \
    for (int i = 0; i < N; ++i) result[i] = a.v[i] op b.v[i]; \
    return result;                                            \
  }
  MSL_COMPARISON(==)
  MSL_COMPARISON(!=)
  MSL_COMPARISON(<)
  MSL_COMPARISON(<=)
  MSL_COMPARISON(>)
  MSL_COMPARISON(>=)
#undef MSL_COMPARISON
  friend vec operator-(vec a) {
    for (int i = 0; i < N; ++i) a.v[i] = T(-a.v[i]);
    return a;
  }
  friend vec operator~(vec a) {
    for (int i = 0; i < N; ++i) a.v[i] = T(~a.v[i]);
    return a;
  }

 private:
  template <class U>
  std::enable_if_t<is_scalar<U>::value> append(int& next, U x) {
    v[next++] = T(x);
  }
  template <class U, int M>
  void append(int& next, vec<U, M> x) {
    for (int i = 0; i < M; ++i) v[next++] = T(x[i]);
  }
  template <class U, int M, int first>
  void append(int& next, Part<U, M, first> x) {
    append(next, vec<U, M>(x));
  }
};

#define MSL_VECTORS(T)    \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
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

}  // namespace metal
