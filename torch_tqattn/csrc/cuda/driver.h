// The CUDA driver and NVRTC, as PyTorch has loaded them. They are declared here and found at run time, so that no CUDA
// header is needed to build, and one build serves PyTorch with CUDA, whichever version, and without.
#pragma once

#include <cstddef>

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

// X(name, parameters): each returns 0, or an error.
#define TQ_DRIVER_FUNCTIONS(X)                                                                                 \
  X(cuGetErrorString, (int error, const char** text))                                                          \
  X(cuDeviceGet, (int* device, int index))                                                                     \
  X(cuDeviceGetAttribute, (int* value, int attribute, int device))                                             \
  X(cuDevicePrimaryCtxRetain, (Context * context, int device))                                                 \
  X(cuCtxGetCurrent, (Context * context))                                                                      \
  X(cuCtxSetCurrent, (Context context))                                                                        \
  X(cuModuleLoadData, (Module * module, const void* image))                                                    \
  X(cuModuleGetFunction, (Function * function, Module module, const char* name))                               \
  X(cuFuncGetAttribute, (int* value, int attribute, Function function))                                        \
  X(cuFuncSetAttribute, (Function function, int attribute, int value))                                         \
  X(cuLaunchKernel,                                                                                            \
    (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
     unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra))                  \
  X(cuThreadExchangeStreamCaptureMode, (int* mode))                                                            \
  X(nvrtcCreateProgram, (Program * program, const char* source, const char* name, int header_count,            \
                         const char* const* headers, const char* const* header_names))                         \
  X(nvrtcCompileProgram, (Program program, int option_count, const char* const* options))                      \
  X(nvrtcGetProgramLogSize, (Program program, size_t* size))                                                   \
  X(nvrtcGetProgramLog, (Program program, char* log))                                                          \
  X(nvrtcGetCUBINSize, (Program program, size_t* size))                                                        \
  X(nvrtcGetCUBIN, (Program program, char* image))                                                             \
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

// One of the device's attributes.
int device_attribute(int attribute, int device);

}  // namespace tqattn::cuda
