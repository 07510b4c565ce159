// The CPU kernels for one instruction set: included once by each of baseline.cpp, avx2.cpp and avx512.cpp.

namespace {

// clang-format off: each uses the ones before it
#include "simd.h"
#include "rotate_impl.h"
#include "quantise_impl.h"
#include "pack_impl.h"
#include "encode_impl.h"
#include "levels_impl.h"
#include "rows_impl.h"
#include "decode_impl.h"
#include "tile_impl.h"
#include "integers_impl.h"
#include "attend_impl.h"
// clang-format on

constexpr Kernels kTable = {TQ_ISA_NAME, rotate, encode, store_dense, decode, attend};

}  // namespace
