// The CUDA driver and NVRTC, as PyTorch has loaded them. They are declared here and found at run time, so that no CUDA
// header is needed to build, and one build serves PyTorch with CUDA, whichever version, and without.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tqattn::cuda {

using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Program = struct ProgramHandle*;

// Values of CUDA's enumerations.
constexpr int kMaxThreadsPerBlock = 0, kSharedBytes = 1, kMaxDynamicSharedBytes = 8;  // of a function
constexpr int kMultiprocessors = 16, kMajorVersion = 75, kMinorVersion = 76,
              kMaxSharedBytesOfKernel = 97;  // a device's
constexpr int kRelaxedCapture = 2;
constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;  // a launch's

// CUDA's structures, as the driver has them in memory.
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    int value;
    unsigned cluster[3];
    char room[64];
  };
};
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

// X(name, parameters): each returns 0, or an error.
#define TQ_DRIVER_FUNCTIONS(X)                                                                          \
  X(cuGetErrorString, (int error, const char** text))                                                   \
  X(cuDeviceGet, (int* device, int index))                                                              \
  X(cuDeviceGetAttribute, (int* value, int attribute, int device))                                      \
  X(cuDevicePrimaryCtxRetain, (Context * context, int device))                                          \
  X(cuCtxGetCurrent, (Context * context))                                                               \
  X(cuCtxSetCurrent, (Context context))                                                                 \
  X(cuModuleLoadData, (Module * module, const void* image))                                             \
  X(cuModuleGetFunction, (Function * function, Module module, const char* name))                        \
  X(cuFuncGetAttribute, (int* value, int attribute, Function function))                                 \
  X(cuFuncSetAttribute, (Function function, int attribute, int value))                                  \
  X(cuDriverGetVersion, (int* version))                                                                 \
  X(cuLaunchKernelEx, (const LaunchConfig* config, Function function, void** parameters, void** extra)) \
  X(cuThreadExchangeStreamCaptureMode, (int* mode))                                                     \
  X(nvrtcCreateProgram, (Program * program, const char* source, const char* name, int header_count,     \
                         const char* const* headers, const char* const* header_names))                  \
  X(nvrtcCompileProgram, (Program program, int option_count, const char* const* options))               \
  X(nvrtcGetProgramLogSize, (Program program, size_t* size))                                            \
  X(nvrtcGetProgramLog, (Program program, char* log))                                                   \
  X(nvrtcGetCUBINSize, (Program program, size_t* size))                                                 \
  X(nvrtcGetCUBIN, (Program program, char* image))                                                      \
  X(nvrtcDestroyProgram, (Program * program))

struct Driver {
#define TQ_MEMBER(name, parameters) int(*name) parameters;
  TQ_DRIVER_FUNCTIONS(TQ_MEMBER)
#undef TQ_MEMBER
};

// Loaded when first asked for. Raises an error if this PyTorch has no CUDA.
const Driver& driver();

// Raises an error that says what failed, and why, unless the driver's result is 0.
void check(int result, const char* what);

struct DeviceProperties {
  uint32_t processors;
  uint32_t version;       // compute capability: 90 for 9.0
  uint32_t shared_bytes;  // that a block may have
  bool starts_early;      // whether a kernel may be started before the one ahead of it has ended
};

// Asked for once.
const DeviceProperties& properties(int device);

}  // namespace tqattn::cuda
