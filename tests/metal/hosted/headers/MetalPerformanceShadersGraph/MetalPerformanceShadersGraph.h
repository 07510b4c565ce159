// Torch's MPS headers name these classes; nothing is called.
#pragma once

#include <Metal/Metal.h>

@class MPSGraph, MPSGraphCompilationDescriptor, MPSGraphExecutionDescriptor;
