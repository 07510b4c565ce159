// The order of kernels. A GPU may start a kernel while those ahead of it still run, to have it ready when they end.
#pragma once

// Every kernel calls this, in all threads, before it reads or writes memory of the device. Where kernels do start early
// (csrc/cuda/launch.cpp), it waits for all that earlier ones have written, and lets the next kernel start.
static inline void tq_wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
