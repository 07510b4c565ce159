"""A Metal shader as CUDA C++ for NVRTC: csrc/cuda/metal_stdlib.h, then the shader with new signatures of its kernels.

A kernel takes its buffers in their order and then the grid: `constant T&` by value, other buffers as pointers. What
Metal hands to a thread is computed from CUDA's indices. Blocks are counted in one dimension where the others would be
longer than CUDA's, which end at 65535.
"""

import re
from pathlib import Path

from metal_source import Argument, Kernel, kernels, replace_attributes, threadgroup_variables

METAL_STDLIB = Path(__file__).resolve().parents[1] / "torch_tqattn" / "csrc" / "cuda" / "metal_stdlib.h"

_GROUP = "threadgroup_position_in_grid"
_BUILTINS = {
    (_GROUP, "uint"): "blockIdx.x",
    (_GROUP, "uint3"): (
        "gridDim.x == grid.x ? make_uint3(blockIdx.x, blockIdx.y, blockIdx.z) : "
        "make_uint3(blockIdx.x % grid.x, blockIdx.x / grid.x % grid.y, blockIdx.x / grid.x / grid.y)"
    ),
    ("thread_index_in_threadgroup", "uint"): "threadIdx.x",
    ("thread_index_in_simdgroup", "uint"): "threadIdx.x % 32",
    # The same in all lanes, which the compiler does not see by itself.
    ("simdgroup_index_in_threadgroup", "uint"): "__shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0)",
    ("simdgroups_per_threadgroup", "uint"): "blockDim.x / 32",
}

# The most threads of a threadgroup, before a kernel whose signature is rewritten.
_THREADS = re.compile(r'\[\[max_total_threads_per_threadgroup\((\w+)\)\]\]\s+(extern "C" __global__ void )')


def _parameter(argument: Argument) -> str:
    value = re.fullmatch(r"constant (\w+)\s*&", argument.type)
    return f"const __grid_constant__ {value[1]} {argument.name}" if value else f"{argument.type} {argument.name}"


def _signature(kernel: Kernel) -> str:
    """What takes the place of everything from `kernel void` to the brace that opens the body."""
    buffers = [a for a in kernel.arguments if a.attribute == "buffer"]
    if [a.index for a in buffers] != list(range(len(buffers))):
        raise ValueError(f"kernel {kernel.name}: buffers are not declared in the order of their indices")
    values = []
    for a in kernel.arguments:
        if a.attribute == "threadgroup":
            if a.index != 0:
                raise ValueError(f"kernel {kernel.name}: more than one block of threadgroup memory")
            values.append("extern __shared__ __align__(16) unsigned char threadgroup_memory[];")
            values.append(f"{a.type} {a.name} = reinterpret_cast<{a.type}>(threadgroup_memory);")
        elif a.attribute != "buffer":
            if (a.attribute, a.type) not in _BUILTINS:
                raise ValueError(f"kernel {kernel.name}: no {a.attribute} of type {a.type} for CUDA yet")
            values.append(f"{a.type} {a.name} = {_BUILTINS[a.attribute, a.type]};")
    parameters = ", ".join([*(_parameter(a) for a in buffers), "const __grid_constant__ uint3 grid"])
    return f'extern "C" __global__ void {kernel.name}({parameters}) {{ {" ".join(values)}'


def cuda_source(text: str) -> str:
    """The shader's text, its headers in it, as CUDA C++. Lines stay where #line says that they are.

    Raises:
        ValueError: a kernel has an argument for which there is no equivalent yet.
    """
    for variable in reversed(threadgroup_variables(text)):
        text = f"{text[: variable.start]}__shared__{text[variable.start + len('threadgroup') :]}"
    for kernel in reversed(kernels(text)):
        lines = "\n" * text.count("\n", kernel.start, kernel.body)
        text = f"{text[: kernel.start]}{_signature(kernel)}{lines}{text[kernel.body + 1 :]}"
    text = _THREADS.sub(r"\2__launch_bounds__(\1) ", text)
    shader = replace_attributes(text, lambda name, argument: "").replace("#include <metal_stdlib>\n", "\n")
    stdlib = METAL_STDLIB.read_text(encoding="ascii").replace("#pragma once\n", "\n")
    return f'#line 1 "{METAL_STDLIB.name}"\n{stdlib}namespace metal {{\nnamespace shader {{\n{shader}}}\n}}\n'
