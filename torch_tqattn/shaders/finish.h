// The last step of attention for one query row: its state becomes its result.
//
// Specialised by: TQ_OUTPUT.
#pragma once

#include "params.h"
#include "state.h"

// A logit with a weight and no value.
static inline void tq_add_sink(float sink, thread TqState& state) {
  TqRow nothing;
  tq_clear(nothing);
  tq_merge(sink, 1.0f, nothing, state);
}

// Divides by the sum of weights, undoes the rotation, and leaves row number `row` where the caller wants it. All lanes
// of the simdgroup call it together; those that hold no row of their own write none.
static inline void tq_finish(thread TqState& state, constant TqFinishParams& params, uint lane, uint signs,
                             bool is_there, ulong row, device TQ_OUTPUT* out, device float* lse) {
  tq_scale(state.sum != 0.0f ? 1.0f / state.sum : 0.0f, state.out);
  if (params.undo_rotation != 0) tq_undo_rotation(lane, signs, state.out);
  if (!is_there) return;
  tq_store(out + row * TQ_HEAD_DIM, lane, state.out);
  if (params.has_lse != 0 && tq_place(lane) == 0) {
    lse[row] = state.sum == 0.0f ? -INFINITY : state.largest + precise::log(state.sum);
  }
}
