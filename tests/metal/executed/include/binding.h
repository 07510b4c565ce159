// Kernel arguments: what C++ knows of their types, and their values for the thread that runs.
#pragma once

#include <tuple>
#include <type_traits>

#include "msl_vector.h"
#include "runtime.h"

namespace msl_runtime {

template <class F>
struct Signature;
template <class... Arguments>
struct Signature<void (*)(Arguments...)> {
  template <int i>
  using Argument = std::tuple_element_t<i, std::tuple<Arguments...>>;
};
template <auto kernel, int i>
using Argument = typename Signature<decltype(kernel)>::template Argument<i>;

template <class T>
using Target = std::remove_pointer_t<std::remove_reference_t<T>>;

template <class T>
constexpr MslArgument memory_argument(const char* name, MslArgumentKind kind, uint32_t index) {
  return {name,
          kind,
          index,
          std::is_reference<T>::value ? sizeof(Target<T>) : 0,
          alignof(Target<T>),
          !std::is_const<Target<T>>::value};
}
constexpr MslArgument builtin_argument(const char* name) { return {name, MSL_BUILTIN, 0, 0, 1, 0}; }

template <class T>
T memory_value(void* address) {
  if constexpr (std::is_reference<T>::value) {
    return *static_cast<std::remove_reference_t<T>*>(address);
  } else {
    return static_cast<T>(address);
  }
}

template <class T>
T builtin_value(Builtin which) {
  const Index3 index = builtin(which);
  if constexpr (metal::is_scalar<T>::value) {
    return T(index.v[0]);
  } else {
    T value;
    for (int i = 0; i < metal::Count<T>::value; ++i) value[i] = index.v[i];
    return value;
  }
}

}  // namespace msl_runtime
