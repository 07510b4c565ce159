// The rotation of whole rows, and its inverse. Every simdgroup takes TQ_SIMD_ROWS rows.
//
// Specialised by: TQ_HEAD_DIM, TQ_INPUT (the type of x).
#include <metal_stdlib>
using namespace metal;

#include "order.h"
#include "row.h"

// The row of this group of lanes; zeros for a group without one, which takes part in every exchange all the same.
static inline void tq_load_row(device const TQ_INPUT* x, uint index, uint rows, uint lane, thread TqRow& row) {
  if (index < rows) {
    tq_load(x + ulong(index) * TQ_HEAD_DIM, lane, row);
  } else {
    tq_clear(row);
  }
}

static inline void tq_store_row(device float* y, uint index, uint rows, uint lane, thread const TqRow& row) {
  if (index < rows) tq_store(y + ulong(index) * TQ_HEAD_DIM, lane, row);
}

static inline uint tq_row_index(uint simdgroup, uint lane) { return simdgroup * TQ_SIMD_ROWS + lane / TQ_ROW_LANES; }

kernel void tq_rotate_rows(device const TQ_INPUT* x [[buffer(0)]], device float* y [[buffer(1)]],
                           constant uint& rows [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint signs = tq_signs(lane);
  tq_wait_for_earlier_kernels();
  const uint index = tq_row_index(group * simdgroups + simdgroup, lane);
  TqRow row;
  tq_load_row(x, index, rows, lane, row);
  tq_rotate(lane, signs, row);
  tq_store_row(y, index, rows, lane, row);
}

kernel void tq_undo_rotation_of_rows(device const TQ_INPUT* x [[buffer(0)]], device float* y [[buffer(1)]],
                                     constant uint& rows [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                                     uint simdgroups [[simdgroups_per_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
  const uint signs = tq_signs(lane);
  tq_wait_for_earlier_kernels();
  const uint index = tq_row_index(group * simdgroups + simdgroup, lane);
  TqRow row;
  tq_load_row(x, index, rows, lane, row);
  tq_undo_rotation(lane, signs, row);
  tq_store_row(y, index, rows, lane, row);
}
