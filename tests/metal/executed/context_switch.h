// Switches between fibers: saves the registers that a callee must keep, and the stack pointer to *from, then continues
// at `to`. ucontext also saves signal masks, by a system call.
#pragma once

#include <cstdint>

extern "C" void msl_switch_context(void** from, void* to) __asm__("msl_switch_context");

#if defined(__x86_64__)
__asm__(R"(
  .text
  .p2align 4
  msl_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kSavedWords = 8, kReturnWord = 6;  // one word more keeps the stack aligned
#elif defined(__aarch64__)
__asm__(R"(
  .text
  .p2align 4
  msl_switch_context:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int kSavedWords = 20, kReturnWord = 11;
#else
#error "fibers are written for x86-64 and arm64 only"
#endif

// The stack pointer of a fiber that has not started; `start` must never return.
inline void* new_context(char* stack, uint64_t bytes, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) top[i] = nullptr;
  top[kReturnWord] = reinterpret_cast<void*>(start);
  return top;
}
