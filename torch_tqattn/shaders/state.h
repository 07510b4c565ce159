// What softmax attention has gathered of a query so far: the largest logit, the sum of the weights relative to it, and
// the weighted sum of the values. merge is the one way in which two of them become one.
#pragma once

#include "row.h"

// Below every logit that is a number: -infinity would make NaN of the difference of two.
#define TQ_NO_LOGIT (-1.0e38f)

struct TqState {
  float largest;
  float sum;
  TqRow out;
};

static inline void tq_start(thread TqState& state) {
  state.largest = TQ_NO_LOGIT;
  state.sum = 0.0f;
  tq_clear(state.out);
}

// The factor of what was gathered relative to `largest`, once it is relative to `new_largest`.
static inline float tq_decay(float largest, float new_largest) { return precise::exp(largest - new_largest); }

static inline void tq_merge(float largest, float sum, thread const TqRow& out, thread TqState& state) {
  const float new_largest = max(state.largest, largest);
  const float mine = tq_decay(state.largest, new_largest), its = tq_decay(largest, new_largest);
  state.largest = new_largest;
  state.sum = state.sum * mine + sum * its;
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) state.out.x[i] = state.out.x[i] * mine + out.x[i] * its;
}
