// Comes before csrc/operators.cpp: torch_tqattn's own library has registered the operators for the CPU and for the meta
// device, so here the lines that do so register them for the mps device, and for nothing.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) REGISTER_FOR_##key(ns, m)
#define REGISTER_FOR_CPU(ns, m) _TORCH_LIBRARY_IMPL(ns, MPS, m, C10_UID)
#define REGISTER_FOR_Meta(ns, m) [[maybe_unused]] static void left_out(torch::Library& m)
