// Memory read many bytes at a time.
#pragma once

#include "row.h"

// A number of a pair of half precision, the first of which is in the lower bits.
static inline float tq_unpack(uint pair, uint which) {
  return float(as_type<half>(ushort(which == 0 ? pair & 0xFFFFu : pair >> 16)));
}

template <typename T>
static inline device const uchar* tq_bytes(device const T* numbers) {
  return reinterpret_cast<device const uchar*>(numbers);
}

// Has the 32 bytes at a place fetched into the first cache, or into the second one, which all processors share: there
// they may be before earlier kernels have ended, as what these still write is seen there.
template <bool is_shared>
static inline void tq_fetch(device const uchar* bytes) {
#ifdef __CUDA_ARCH__
  if (is_shared) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes));
  } else {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(bytes));
  }
#endif
}

// Where rows are read from: memory of the device, or of the threadgroup.
struct TqFar {
  device const uchar* bytes;
  template <typename T>
  T get(uint offset) const {
    return *reinterpret_cast<device const T*>(bytes + offset);
  }
};
struct TqNear {
  threadgroup const uchar* bytes;
  template <typename T>
  T get(uint offset) const {
    return *reinterpret_cast<threadgroup const T*>(bytes + offset);
  }
};

template <typename T>
static inline TqFar tq_far(device const T* numbers) {
  TqFar rows;
  rows.bytes = tq_bytes(numbers);
  return rows;
}

template <uint bytes, typename Bytes>
static inline void tq_read(thread const Bytes& row, uint offset, thread uint* words) {
  if (bytes >= 16) {
#pragma unroll
    for (uint i = 0; i < bytes / 16; ++i) {
      const uint4 four = row.template get<uint4>(offset + 16 * i);
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else if (bytes == 8) {
    const uint2 two = row.template get<uint2>(offset);
    words[0] = two.x;
    words[1] = two.y;
  } else if (bytes == 4) {
    words[0] = row.template get<uint>(offset);
  } else if (bytes == 2) {
    words[0] = row.template get<ushort>(offset);
  } else {
    words[0] = row.template get<uchar>(offset);
  }
}

// This lane's part of a row of numbers of 16 bits, which begins at a multiple of 16 bytes.
template <typename T>
static inline void tq_load_words(device const T* row, uint lane, thread uint (&words)[TQ_LANE_DIMS / 2]) {
  if (!tq_is_used(lane)) return;
  tq_read<2 * TQ_LANE_DIMS>(tq_far(row + tq_place(lane) * TQ_LANE_DIMS), 0, words);
}

static inline float tq_number_of(half, uint pair, uint which) { return tq_unpack(pair, which); }
static inline float tq_number_of(bfloat, uint pair, uint which) {
  return as_type<float>(which == 0 ? pair << 16 : pair & 0xFFFF0000u);
}

template <typename T>
static inline void tq_numbers_of_words(T type, uint lane, thread const uint (&words)[TQ_LANE_DIMS / 2],
                                       thread TqRow& row) {
#pragma unroll
  for (uint i = 0; i < TQ_LANE_DIMS; ++i) row.x[i] = tq_is_used(lane) ? tq_number_of(type, words[i / 2], i % 2) : 0.0f;
}
