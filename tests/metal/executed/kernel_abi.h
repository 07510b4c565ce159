/* What a compiled shader exports: its kernels, with their arguments, and a function that dispatches each of them.
 *
 * A shader is a shared object that exports
 *
 *     const MslKernel* msl_find_kernel(const char* name);   null if there is none of that name
 *     const MslKernel* msl_kernel_at(uint32_t index);       null past the last
 *
 * Dispatches of all threads of a process take turns. compile.py makes the shared object, runner.py calls it. */
#ifndef MSL_KERNEL_ABI_H
#define MSL_KERNEL_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Threadgroup memory: what the largest GPUs have; those that Metal runs on have 32768 bytes. */
enum { MSL_MAX_BINDINGS = 31, MSL_SIMD_WIDTH = 32, MSL_MAX_THREADS = 1024, MSL_MAX_THREADGROUP_BYTES = 232448 };

typedef enum { MSL_BUFFER, MSL_THREADGROUP, MSL_BUILTIN } MslArgumentKind;

typedef struct {
  const char* name;
  MslArgumentKind kind;
  uint32_t index;     /* of a buffer or of threadgroup memory */
  uint64_t size;      /* of what a reference refers to, e.g. a constant struct; 0 for a pointer */
  uint32_t alignment; /* that the address must have */
  uint32_t writable;  /* 1: the kernel may write there */
} MslArgument;

typedef struct {
  void* const* buffers; /* by index; null where nothing is bound */
  const uint64_t* buffer_bytes;
  uint32_t buffer_count;
  const uint64_t* threadgroup_bytes; /* by index; 0 where no length was set */
  uint32_t threadgroup_count;
  uint32_t grid[3];    /* in threadgroups */
  uint32_t threads[3]; /* of a threadgroup */
  uint64_t seed;       /* of the order in which threadgroups, threads and reductions proceed */
  char* error;         /* for a message, always terminated */
  uint64_t error_bytes;
} MslDispatch;

typedef struct MslKernel {
  const char* name;
  const MslArgument* arguments;
  uint32_t argument_count;
  uint64_t static_threadgroup_bytes;
  int (*run)(const MslDispatch* dispatch); /* 0, or 1 with a message in `error` */
} MslKernel;

#ifdef __cplusplus
}
#endif

#endif
