// What a query may see.
#pragma once

#include "params.h"

// Positions begin..end, where its row of the mask allows them.
struct TqVisible {
  int begin;
  int end;
  uint mask_row;
};

// Of query `token` in sequence `batch`, whose tokens are first..length.
static inline TqVisible tq_visible(constant TqAttendParams& params, uint batch, int first, int length, uint token) {
  const int newest = length - int(params.q_len) + int(token);
  TqVisible seen;
  seen.begin = max(int(params.start), first);
  seen.end = params.causal != 0 ? min(length, newest + 1) : length;
  if (params.window != 0) seen.begin = max(seen.begin, newest - int(params.window) + 1);
  seen.mask_row = (params.mask_batch > 1 ? batch : 0) * params.mask_rows + (params.mask_rows > 1 ? token : 0);
  return seen;
}
