// What a GPU has to launch for each of the backend's calls: kernels, specialisations, grids, memory and arguments.
#pragma once

#include <vector>

#include "../backend.h"
#include "launch.h"

namespace tqattn::gpu {

// What the plans depend on of a device.
struct Device {
  uint32_t queries;       // query rows that one simdgroup attends for at once: 1, 2 or 4
  uint32_t threadgroups;  // how many keep the device busy
  // Processors with fast products of small matrices, and threadgroup memory of each; 0: attend_matrix.metal does not
  // run there, or does not pay.
  uint32_t matrix_processors = 0;
  uint32_t matrix_bytes = 0;
  bool has_clusters = false;         // of threadgroups that read each other's memory
  uint32_t encode_simdgroups = 4;    // at most, of a threadgroup that codes a block
  uint32_t encode_threadgroups = 1;  // among so many, blocks are coded in pieces
};

std::vector<Launch> plan_rotate(const at::Tensor& x, bool inverse, const at::Tensor& out);
std::vector<Launch> plan_encode(const EncodeCall& call, const Device& device);
std::vector<Launch> plan_attend(const AttendCall& call, const Device& device);
std::vector<Launch> plan_decode(const DecodeCall& call);
std::vector<Launch> plan_reduce(const ReduceCall& call);

}  // namespace tqattn::gpu
