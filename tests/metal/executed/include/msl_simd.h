// Functions at which threads meet.
#pragma once

#include "msl_math.h"
#include "runtime.h"

// A last argument that callers leave out.
#define MSL_SITE(name) ::msl_runtime::Site site = {#name, __builtin_FILE(), __builtin_LINE()}

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline void threadgroup_barrier(mem_flags memory, MSL_SITE(threadgroup_barrier)) {
  ::msl_runtime::barrier(true, uint(memory), site);
}
inline void simdgroup_barrier(mem_flags memory, MSL_SITE(simdgroup_barrier)) {
  ::msl_runtime::barrier(false, uint(memory), site);
}

// The order of a reduction is not specified, so it is random here.
template <class Operation, class T>
T simd_reduce(T x, ::msl_runtime::Site site) {
  ::msl_runtime::exchange(
      &x,
      [](void* const* lanes) {
        T* all[MSL_SIMD_WIDTH];
        uint count = 0;
        for (uint i = 0; i < MSL_SIMD_WIDTH; ++i) {
          if (lanes[i] != nullptr) all[count++] = static_cast<T*>(lanes[i]);
        }
        uint order[MSL_SIMD_WIDTH];
        ::msl_runtime::shuffle(order, count);
        T partial[MSL_SIMD_WIDTH];
        for (uint i = 0; i < count; ++i) partial[i] = *all[order[i]];
        for (uint left = count; left > 1; left = (left + 1) / 2) {
          for (uint i = 0; i < left / 2; ++i) partial[i] = Operation::apply(partial[i], partial[i + (left + 1) / 2]);
        }
        for (uint i = 0; i < count; ++i) *all[i] = partial[0];
      },
      site);
  return x;
}

#define MSL_REDUCTION(name, result)                                                    \
  struct Operation_##name {                                                            \
    template <class T>                                                                 \
    static T apply(T a, T b) {                                                         \
      return T(result);                                                                \
    }                                                                                  \
  };                                                                                   \
  template <class T>                                                                   \
  inline T name(T x, MSL_SITE(name)) {                                                 \
    static_assert(sizeof(T) <= 4 || Count<T>::value > 1, "there is no 64-bit " #name); \
    return simd_reduce<Operation_##name>(x, site);                                     \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a* b)
MSL_REDUCTION(simd_max, max(a, b))
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_and, a& b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION

constexpr int kOwnValue = -1;

template <class T>
T simd_from(T x, int source, ::msl_runtime::Site site) {
  struct Lane {
    T value, result;
    int source;
    bool is_missing;
  } mine = {x, x, source, false};
  ::msl_runtime::exchange(
      &mine,
      [](void* const* lanes) {
        for (uint i = 0; i < MSL_SIMD_WIDTH; ++i) {
          Lane* to = static_cast<Lane*>(lanes[i]);
          if (to == nullptr || to->source == kOwnValue) continue;
          to->is_missing = to->source >= MSL_SIMD_WIDTH || lanes[to->source] == nullptr;
          if (!to->is_missing) to->result = static_cast<const Lane*>(lanes[to->source])->value;
        }
      },
      site);
  if (mine.is_missing) ::msl_runtime::fail(site, "reads a lane that does not exist");
  return mine.result;
}

template <class T>
inline T simd_shuffle(T x, ushort source, MSL_SITE(simd_shuffle)) {
  return simd_from(x, source, site);
}
template <class T>
inline T simd_broadcast(T x, ushort source, MSL_SITE(simd_broadcast)) {
  return simd_from(x, source, site);
}
template <class T>
inline T simd_broadcast_first(T x, MSL_SITE(simd_broadcast_first)) {
  return simd_from(x, 0, site);
}
template <class T>
inline T simd_shuffle_xor(T x, ushort mask, MSL_SITE(simd_shuffle_xor)) {
  return simd_from(x, int(::msl_runtime::lane() ^ mask), site);
}
template <class T>
inline T simd_shuffle_down(T x, ushort delta, MSL_SITE(simd_shuffle_down)) {
  const uint source = ::msl_runtime::lane() + delta;
  return simd_from(x, source < MSL_SIMD_WIDTH ? int(source) : kOwnValue, site);
}
template <class T>
inline T simd_shuffle_up(T x, ushort delta, MSL_SITE(simd_shuffle_up)) {
  const uint mine = ::msl_runtime::lane();
  return simd_from(x, mine >= delta ? int(mine - delta) : kOwnValue, site);
}
inline bool simd_any(bool x, MSL_SITE(simd_any)) { return simd_reduce<Operation_simd_or>(uint(x), site) != 0; }
inline bool simd_all(bool x, MSL_SITE(simd_all)) { return simd_reduce<Operation_simd_and>(uint(x), site) != 0; }

template <class T>
T simd_prefix(T x, bool is_inclusive, ::msl_runtime::Site site) {
  struct Lane {
    T value, before;
  } mine = {x, T(0)};
  ::msl_runtime::exchange(
      &mine,
      [](void* const* lanes) {
        T sum = T(0);
        for (uint i = 0; i < MSL_SIMD_WIDTH; ++i) {
          if (Lane* lane = static_cast<Lane*>(lanes[i])) {
            lane->before = sum;
            sum = sum + lane->value;
          }
        }
      },
      site);
  return is_inclusive ? mine.before + x : mine.before;
}
template <class T>
inline T simd_prefix_inclusive_sum(T x, MSL_SITE(simd_prefix_inclusive_sum)) {
  return simd_prefix(x, true, site);
}
template <class T>
inline T simd_prefix_exclusive_sum(T x, MSL_SITE(simd_prefix_exclusive_sum)) {
  return simd_prefix(x, false, site);
}

}  // namespace metal
