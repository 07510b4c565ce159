// A kernel launch as a plain value. plan.h makes them, the same on every platform; mps/ and cuda/ only carry them out.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tqattn::gpu {

// A kernel of shaders/<shader>.metal, specialised by macros.
struct Kernel {
  const char* shader;
  const char* name;
  std::vector<std::pair<const char*, std::string>> macros;
};

// For messages, and unlike that of any other kernel.
inline std::string describe(const Kernel& kernel) {
  std::string text = std::string(kernel.name) + " of " + kernel.shader + ".metal";
  for (const auto& [name, value] : kernel.macros) text += std::string(" ") + name + "=" + value;
  return text;
}

// The text of a shader, out of the sources that scripts/embed_shaders.py has embedded for a platform.
template <typename Sources>
const char* find_source(const Sources& sources, std::string_view shader) {
  for (const auto& source : sources) {
    if (source.name == shader) return source.text;
  }
  TORCH_INTERNAL_ASSERT(false, "there is no shader ", shader);
}

// What is bound at one buffer index: a tensor on the device, a value, or neither: a pointer that the kernel does not
// follow. Every index that it declares has to be bound.
struct Argument {
  // `alignment`: in bytes, that the kernel's loads need beyond that of the tensor's numbers.
  explicit Argument(const at::Tensor& x, int64_t alignment = 1) : alignment(alignment) {
    if (x.numel() > 0) tensor = x;  // no numbers, no buffer
  }

  template <typename T>
  static Argument value(const T& x) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* first = reinterpret_cast<const uint8_t*>(&x);
    Argument argument;
    argument.bytes.assign(first, first + sizeof(T));
    return argument;
  }

  static Argument unused() { return Argument(); }

  at::Tensor tensor;
  int64_t alignment = 1;
  std::vector<uint8_t> bytes;  // of a value

 private:
  Argument() = default;
};

struct Launch {
  Kernel kernel;
  std::vector<Argument> arguments;            // by buffer index
  std::array<uint32_t, 3> groups;             // threadgroups of the grid
  uint32_t simdgroups;                        // of a threadgroup
  std::vector<uint32_t> threadgroup_bytes{};  // by threadgroup index: multiples of 16
  uint32_t cluster = 1;                       // threadgroups, along the first axis, that read each other's memory
};

}  // namespace tqattn::gpu
