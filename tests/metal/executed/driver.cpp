// Dispatches one kernel in a process of its own, for shaders compiled with sanitisers: theirs must be the first library
// that a process loads.
//
//   driver SHADER KERNEL SEED GRID*3 THREADS*3 THREADGROUP_LENGTHS*31 BUFFER_FILES*31
//
// "-" stands for no buffer. Files are read, and written when the kernel has run.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "kernel_abi.h"

int main(int count, char** words) {
  if (count != 10 + 2 * MSL_MAX_BINDINGS) return 2;
  void* library = dlopen(words[1], RTLD_NOW);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  const auto find = reinterpret_cast<const MslKernel* (*)(const char*)>(dlsym(library, "msl_find_kernel"));
  const MslKernel* kernel = find(words[2]);
  if (kernel == nullptr) {
    std::fprintf(stderr, "no kernel %s\n", words[2]);
    return 2;
  }

  const auto number = [&](int i) { return std::strtoull(words[i], nullptr, 10); };
  std::vector<std::vector<char>> contents(MSL_MAX_BINDINGS);
  void* buffers[MSL_MAX_BINDINGS] = {};
  uint64_t buffer_bytes[MSL_MAX_BINDINGS] = {}, threadgroup_bytes[MSL_MAX_BINDINGS] = {};
  char error[1 << 14] = "";
  for (int i = 0; i < MSL_MAX_BINDINGS; ++i) {
    threadgroup_bytes[i] = number(10 + i);
    const std::string path = words[10 + MSL_MAX_BINDINGS + i];
    if (path == "-") continue;
    std::ifstream file(path, std::ios::binary);
    contents[i].assign(std::istreambuf_iterator<char>(file), {});
    buffer_bytes[i] = contents[i].size();
    contents[i].reserve(1);  // an empty buffer has an address too
    buffers[i] = contents[i].data();
  }
  MslDispatch dispatch = {};
  dispatch.buffers = buffers;
  dispatch.buffer_bytes = buffer_bytes;
  dispatch.buffer_count = MSL_MAX_BINDINGS;
  dispatch.threadgroup_bytes = threadgroup_bytes;
  dispatch.threadgroup_count = MSL_MAX_BINDINGS;
  dispatch.seed = number(3);
  for (int i = 0; i < 3; ++i) {
    dispatch.grid[i] = uint32_t(number(4 + i));
    dispatch.threads[i] = uint32_t(number(7 + i));
  }
  dispatch.error = error;
  dispatch.error_bytes = sizeof error;
  const int result = kernel->run(&dispatch);
  std::fputs(error, stderr);
  for (int i = 0; i < MSL_MAX_BINDINGS; ++i) {
    if (buffers[i] == nullptr) continue;
    std::ofstream file(words[10 + MSL_MAX_BINDINGS + i], std::ios::binary);
    file.write(contents[i].data(), std::streamsize(contents[i].size()));
  }
  return result;
}
