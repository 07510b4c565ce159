// A parallel loop over PyTorch's intra-op threads.
#pragma once

#include <ATen/Parallel.h>

#if defined(__APPLE__)
#include <dispatch/dispatch.h>

#include <algorithm>
#elif !defined(_OPENMP)
#error "compile with -fopenmp: at::parallel_for would silently run on one thread"
#endif

namespace tqattn::cpu {

// Calls f(begin, end) on ranges that cover 0..count, several at a time; a range has at least `grain` items.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, const Function& f) {
#if defined(__APPLE__)
  // Apple's compiler ships without OpenMP, and without it at::parallel_for is a plain loop.
  const int64_t chunks = std::min<int64_t>((count + grain - 1) / grain, 4 * at::get_num_threads());
  if (chunks <= 1 || at::get_num_threads() == 1) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  const int64_t size = (count + chunks - 1) / chunks;
  struct Loop {
    const Function& f;
    int64_t size;
    int64_t count;
  } loop{f, size, count};
  dispatch_apply_f((count + size - 1) / size, DISPATCH_APPLY_AUTO, &loop, [](void* context, size_t chunk) {
    const Loop& l = *static_cast<Loop*>(context);
    const int64_t begin = static_cast<int64_t>(chunk) * l.size;
    l.f(begin, std::min(begin + l.size, l.count));
  });
#else
  at::parallel_for(0, count, grain, f);
#endif
}

}  // namespace tqattn::cpu
