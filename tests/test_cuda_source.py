"""The shaders as CUDA C++: compiled for NVIDIA GPUs where there is none. tests/test_cuda.py needs one."""

import nvrtc
import pytest
from cuda_source import cuda_source
from embed_shaders import flatten
from metal import source
from metal.specialisations import specialisations

SHADERS = sorted(source.SHADERS.glob("*.metal"))
# The oldest that CUDA 13 compiles for, and one that PyTorch is often used on.
OLDEST, USUAL = "sm_75", "sm_90"


def check_compiles(path: source.Path, architecture: str, step: int) -> None:
    nvrtc.need()
    text = cuda_source(flatten(path))
    for macros in specialisations(path.name)[::step]:
        image = nvrtc.compile_source(text, macros, architecture)
        assert all(kernel.name.encode() in image for kernel in source.kernels(flatten(path)))


@pytest.mark.parametrize("path", SHADERS, ids=lambda path: path.stem)
def test_a_shader_compiles(path: source.Path) -> None:
    check_compiles(path, OLDEST, 6)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHADERS, ids=lambda path: path.stem)
def test_more_of_its_specialisations_compile(path: source.Path) -> None:
    check_compiles(path, USUAL, 2)


@pytest.mark.parametrize("path", SHADERS, ids=lambda path: path.stem)
def test_every_kernel_waits_for_those_ahead_of_it(path: source.Path) -> None:
    """csrc/cuda/launch.cpp lets it start before they have ended."""
    text = flatten(path)
    found = source.kernels(text)
    for kernel, following in zip(found, [*found[1:], None], strict=True):
        assert "tq_wait_for_earlier_kernels();" in text[kernel.body : following.start if following else None]


KERNEL = """#include <metal_stdlib>
using namespace metal;
kernel void f(device float* y [[buffer(0)]],
              constant uint& count [[buffer(1)]], threadgroup float* scratch [[threadgroup(0)]],
              uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[4];
  sums[0] = 1.0f;
  scratch[lane] = sums[0];
  if (lane < count) y[group.x] = scratch[lane];
}
"""


def test_a_kernel_compiles() -> None:
    nvrtc.need()
    assert nvrtc.compile_source(cuda_source(KERNEL), {}, OLDEST)


def test_lines_of_messages_are_the_shaders() -> None:
    nvrtc.need()
    text = '#line 1 "f.metal"\n' + KERNEL.replace("= 1.0f", "= nothing")
    with pytest.raises(nvrtc.CompileError, match=r'f\.metal\(7\): error: identifier "nothing" is undefined'):
        nvrtc.compile_source(cuda_source(text), {}, OLDEST)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("buffer(1)", "buffer(2)", "buffers are not declared in the order of their indices"),
        ("threadgroup(0)", "threadgroup(1)", "more than one block of threadgroup memory"),
        ("uint3 group", "uint2 group", "no threadgroup_position_in_grid of type uint2"),
        ("thread_index_in_simdgroup", "threads_per_grid", "no threads_per_grid of type uint"),
    ],
)
def test_what_cannot_be_bound_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"kernel f: {message}"):
        cuda_source(KERNEL.replace(old, new))
