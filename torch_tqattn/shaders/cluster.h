// Neighbouring threadgroups that run together and read each other's threadgroup memory, where a GPU has that
// (csrc/gpu/plan.cpp); elsewhere there is one. They are counted along the grid's first axis.
#pragma once

#include "row.h"

// All threads of the cluster call it together. What they have written to threadgroup memory before, all can read after.
static inline void tq_wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
}

// As the former, to leave when nobody reads this threadgroup's memory any more: nothing is handed over.
static inline void tq_leave_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// The two numbers at `at`, a multiple of 8 bytes, of the cluster's threadgroup number `index`.
static inline float2 tq_read_of_cluster(threadgroup const float* at, uint index) {
  float2 two;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(uint(__cvta_generic_to_shared(at))), "r"(index));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(there) : "memory");
#else
  two.x = at[0];
  two.y = at[1];
#endif
  return two;
}

// This lane's part of the row at `row` of the cluster's threadgroup number `index`.
static inline void tq_load_of_cluster(threadgroup const float* row, uint index, uint lane, thread TqRow& out) {
  tq_clear(out);
  if (!tq_is_used(lane)) return;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; i += 2) {
    const float2 two = tq_read_of_cluster(row + tq_place(lane) * TQ_LANE_DIMS + i, index);
    out.x[i] = two.x;
    out.x[i + 1] = two.y;
  }
}
