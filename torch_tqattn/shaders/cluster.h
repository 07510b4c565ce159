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

// Numbers sent to all of the cluster's threadgroups, each of which waits until it has them: the sender does not wait,
// as tq_wait_for_cluster does for all that it has written anywhere. `box` is 8 bytes of threadgroup memory.

// Called early, by all threads.
static inline void tq_open_box(threadgroup ulong* box, bool is_first_thread) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (is_first_thread) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(uint(__cvta_generic_to_shared(box))) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

// Called by all threads before they send anything: all threadgroups have started. So many bytes are awaited here.
static inline void tq_wait_for_boxes(threadgroup ulong* box, uint bytes, bool is_first_thread) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  if (is_first_thread) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(uint(__cvta_generic_to_shared(box))),
                 "r"(bytes)
                 : "memory");
  }
#endif
}

// Puts four numbers where `at` is, a multiple of 16 bytes, in the cluster's threadgroup number `index`.
static inline void tq_send(threadgroup float* at, threadgroup ulong* box, uint index, float4 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint there, its_box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(uint(__cvta_generic_to_shared(at))), "r"(index));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its_box) : "r"(uint(__cvta_generic_to_shared(box))), "r"(index));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   there),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(its_box)
               : "memory");
#else
  at[0] = x.x;
  at[1] = x.y;
  at[2] = x.z;
  at[3] = x.w;
#endif
}

// Waits, in all threads, for what has been sent here.
static inline void tq_wait_for_box(threadgroup ulong* box) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint is_full = 0;
  while (is_full == 0) {
    asm volatile("{ .reg .pred full; mbarrier.try_wait.parity.shared::cta.b64 full, [%1], 0; selp.u32 %0, 1, 0, full; }"
                 : "=r"(is_full)
                 : "r"(uint(__cvta_generic_to_shared(box)))
                 : "memory");
  }
#else
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
}
