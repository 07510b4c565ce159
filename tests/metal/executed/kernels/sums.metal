// A sum in each of two rounds: what tests take barriers out of.
#include <metal_stdlib>
using namespace metal;

kernel void two_sums(device const float* x [[buffer(0)]], device float* sums [[buffer(1)]],
                     threadgroup float* first_round [[threadgroup(0)]], uint group [[threadgroup_position_in_grid]],
                     uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float swapped[256];
  const uint threads = 32u * simdgroups;
  for (uint round = 0; round < 2; ++round) {
    const float mine = x[(2 * group + round) * threads + thread_index];
    swapped[thread_index] = mine;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const float other = swapped[thread_index ^ 1u];
    const float sum = simd_sum(mine - 0.5f * other);
    if (lane == 0) first_round[simdgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0.0f;
    for (uint i = 0; i < simdgroups; ++i) total += first_round[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index == 0) sums[2 * group + round] = total;
  }
}
