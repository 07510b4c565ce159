"""The shaders' results on the CPU, and what the machine that runs them there notices."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metal import needs, source
from metal.executed.compile import MODES, CompileError, compile_shader
from metal.executed.runner import KernelError, Library

from torch_tqattn import format as fmt

FOLDER = Path(source.__file__).parent / "executed"
SUMS = FOLDER / "kernels" / "sums.metal"
TYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
CHECKED = ("sanitised", "race")


@pytest.fixture(autouse=True)
def _tools() -> None:
    needs.cpp_compiler()


# Rotation


def rotated(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    """By the definition, in the type of x."""
    head_dim = x.shape[-1]
    signs, matrix = fmt.signs(head_dim).to(x.dtype), fmt.hadamard(head_dim).to(x.dtype)
    y = (x if inverse else x * signs) @ matrix / math.sqrt(head_dim)
    return y * signs if inverse else y


def check_rotation(head_dim: int, type_name: str, mode: str, seed: int, rows: int = 21) -> None:
    library = Library(
        compile_shader(source.SHADERS / "rotate.metal", {"TQ_HEAD_DIM": head_dim, "TQ_INPUT": type_name}, mode)
    )
    x = torch.randn(rows, head_dim).to(TYPES[type_name])
    for name, inverse in (("tq_rotate_rows", False), ("tq_undo_rotation_of_rows", True)):
        y = torch.full((rows, head_dim), math.nan)
        # Two simdgroups of 32 lanes for each threadgroup, and at least one row each.
        library.kernel(name).dispatch(
            [x, y, np.uint32(rows)], grid=((rows + 1) // 2, 1, 1), threads=(64, 1, 1), seed=seed
        )
        expected = rotated(x.double(), inverse)
        assert (y - expected).norm() <= 2 * (rotated(x.float(), inverse) - expected).norm()


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_rotation(head_dim: int) -> None:
    type_name = list(TYPES)[fmt.HEAD_DIMS.index(head_dim) % len(TYPES)]
    for seed in range(3):
        check_rotation(head_dim, type_name, "plain", seed)


@pytest.mark.parametrize("mode", CHECKED)
@pytest.mark.parametrize(("head_dim", "type_name"), [(80, "half"), (192, "bfloat"), (256, "float")])
def test_rotation_with_checks(head_dim: int, type_name: str, mode: str) -> None:
    check_rotation(head_dim, type_name, mode, seed=1, rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_rotation_in_every_specialisation(head_dim: int, type_name: str, mode: str) -> None:
    for seed, rows in ((0, 1), (1, 8), (2, 33)):
        check_rotation(head_dim, type_name, mode, seed, rows)


# What is noticed

START = """#include <metal_stdlib>
using namespace metal;
"""


def run(body: str, mode: str, seed: int = 0, groups: int = 1, threads: int = 64, size: int = 64) -> np.ndarray:
    """The buffer `a` after a kernel with this body, which also has threadgroup memory `t`; both of `size` numbers."""
    text = f"""{START}kernel void k(device float* a [[buffer(0)]], threadgroup float* t [[threadgroup(0)]],
        uint i [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
        uint group [[threadgroup_position_in_grid]]) {{
#line 1 "body"
{body}
}}
"""
    a = np.arange(size, dtype=np.float32)
    library = Library(compile_shader(text, mode=mode))
    library.kernel("k").dispatch([a], [4 * size], (groups, 1, 1), (threads, 1, 1), seed)
    return a


def problems(body: str, mode: str, **arguments: int) -> str:
    with pytest.raises(KernelError) as error:
        run(body, mode, **arguments)
    return str(error.value)


@pytest.mark.parametrize("mode", MODES)
def test_threads_take_turns(mode: str) -> None:
    result = run("t[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\na[i] = t[63 - i];", mode)
    assert result.tolist() == list(range(63, -1, -1))


def test_order_depends_on_the_seed() -> None:
    body = "for (uint n = 0; n < 3; ++n) { t[0] = float(i); simdgroup_barrier(mem_flags::mem_none); }\na[i] = t[0];"
    results = [run(body, "plain", seed)[0] for seed in (0, 0, 1, 2, 3)]
    assert results[0] == results[1]
    assert len(set(results)) > 1


def test_order_of_a_sum_depends_on_the_seed() -> None:
    body = "a[i] = simd_sum(i == 0 ? 1.0e8f : i == 1 ? -1.0e8f : 0.1f);"
    assert len({run(body, "plain", seed)[0] for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "expression",
    {
        "simd_max(a[i])": lambda lane: 31,
        "simd_min(a[i])": lambda lane: 0,
        "float(simd_or(i))": lambda lane: 31,
        "float(simd_and(i | 4u))": lambda lane: 4,
        "float(simd_xor(1u << (lane % 4)))": lambda lane: 0,
        "simd_shuffle(a[i], ushort(31 - lane))": lambda lane: 31 - lane,
        "simd_shuffle_xor(a[i], 5)": lambda lane: lane ^ 5,
        "simd_shuffle_down(a[i], 3)": lambda lane: lane + 3 if lane < 29 else lane,
        "simd_shuffle_up(a[i], 3)": lambda lane: lane - 3 if lane > 2 else lane,
        "simd_broadcast(a[i], 7)": lambda lane: 7,
        "simd_broadcast_first(a[i])": lambda lane: 0,
        "simd_prefix_inclusive_sum(a[i])": lambda lane: lane * (lane + 1) // 2,
        "simd_prefix_exclusive_sum(a[i])": lambda lane: lane * (lane - 1) // 2,
        "simd_any(i == 3) ? 1.0f : 0.0f": lambda lane: 1,
        "simd_all(i != 3) ? 1.0f : 0.0f": lambda lane: 0,
        "float2(float4(float2(a[i]), 1.0f, 2.0f).zw).y": lambda lane: 2,
    }.items(),
    ids=lambda item: item[0],
)
def test_functions(expression: tuple[str, Callable[[int], int]]) -> None:
    text, expected = expression
    assert run(f"a[i] = {text};", "plain", threads=32, size=32).tolist() == [expected(lane) for lane in range(32)]


def test_half_is_what_it_is_elsewhere() -> None:
    text = f"""{START}kernel void k(device const float* x [[buffer(0)]], device half* h [[buffer(1)]],
        device bfloat* b [[buffer(2)]], device float* y [[buffer(3)]], uint i [[thread_position_in_grid]]) {{
  h[i] = half(x[i]); b[i] = bfloat(x[i]); y[i] = float(half(x[i]) * half(x[i])) + float(b[i]);
}}
"""
    special = [0.0, -0.0, 1e-8, 2**-24, 2**-25, 3 * 2**-26, 6.1e-5, 65504, 65519.9, 65520, 1e10, math.inf, -math.inf]
    x = torch.cat([torch.tensor(special), torch.randn(4083) * 10 ** torch.empty(4083).uniform_(-9, 5)])
    h, b, y = torch.zeros_like(x).half(), torch.zeros_like(x).bfloat16(), torch.zeros_like(x)
    Library(compile_shader(text)).kernel("k").dispatch([x, h, b, y], grid=(64, 1, 1), threads=(64, 1, 1))
    assert torch.equal(h, x.half())
    assert torch.equal(b, x.bfloat16())
    torch.testing.assert_close(y, (x.half() * x.half()).float() + b.float(), rtol=0, atol=0, equal_nan=True)


def test_a_race_between_threads_is_reported() -> None:
    body = "t[i] = a[i];\na[i] = t[i ^ 1u];"
    text = problems(body, "race")
    assert "race: thread" in text
    assert "(threadgroup memory 0, byte" in text
    assert "body:1" in text
    assert "body:2" in text


def test_a_race_on_device_memory_is_reported() -> None:
    body = "a[i] = 1.0f;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\nt[i] = a[i ^ 32u];"
    assert "(buffer 0, byte" in problems(body, "race")
    run(body.replace("mem_threadgroup", "mem_device"), "race")


def test_a_race_between_threadgroups_is_reported() -> None:
    text = problems("if (i == 0) a[0] = float(group);", "race", groups=2)
    assert "race: thread 0 of threadgroup" in text
    run("if (i == 0) a[group] = 1.0f;", "race", groups=2)


def test_a_simdgroup_barrier_orders_one_simdgroup_only() -> None:
    body = "t[i] = 1.0f;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\na[i] = t[i ^ %du];"
    run(body % 16, "race")
    assert "race" in problems(body % 32, "race")


def test_simd_functions_order_nothing() -> None:
    assert "race" in problems("t[i] = simd_sum(1.0f);\nsimd_sum(1.0f);\na[i] = t[i ^ 1u];", "race")


def test_a_write_after_many_reads_is_a_race() -> None:
    start = "if (i == 0) t[0] = 1.0f;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\na[i] = t[0];\n"
    assert "race" in problems(start + "if (i == 40) t[0] = 2.0f;", "race")
    run(start + "threadgroup_barrier(mem_flags::mem_threadgroup);\nif (i == 40) t[0] = 2.0f;", "race")


def test_reading_what_nobody_has_written_is_reported() -> None:
    assert "reads what nobody has written at body:1" in problems("a[i] = t[i];", "race")


def test_unwritten_threadgroup_memory_is_poisoned() -> None:
    assert np.isnan(run("a[i] = t[i];", "plain", seed=0)).all()
    assert run("a[i] = t[i];", "plain", seed=1).view(np.uint32).tolist() == [0xA5A5A5A5] * 64


@pytest.mark.parametrize("mode", CHECKED)
@pytest.mark.parametrize("access", ["a[i + 1] = 1.0f;", "t[i + 1] = a[i];", "a[i] = a[int(i) - 1];"])
def test_accesses_out_of_bounds_are_reported(access: str, mode: str) -> None:
    text = problems(access, mode)
    assert "body:1" in text
    assert "out of bounds" in text or "heap-buffer-overflow" in text


@pytest.mark.parametrize("mode", CHECKED)
def test_accesses_past_a_threadgroup_variable_are_reported(mode: str) -> None:
    text = problems("threadgroup float x[32];\nthreadgroup float* y = x;\ny[i / 2 + 1] = 1.0f;", mode)
    assert "body:3" in text
    assert "out of bounds" in text or "heap-buffer-overflow" in text


def test_undefined_behaviour_is_reported() -> None:
    assert "shift exponent 32" in problems("a[i] = float(1 << (i + 1));", "sanitised", threads=32)


@pytest.mark.parametrize("mode", ["plain", "race"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (lane < 5) a[i] = simd_sum(1.0f);", "simd_sum at body:1 is reached by only 5 of 32 threads"),
        ("if (lane < 5)\n a[i] = simd_sum(1.0f);\nelse\n a[i] = simd_sum(2.0f);", "simd_sum in divergent flow"),
        ("if (lane == 3) return;\na[i] = simd_max(1.0f);", "simd_max at body:2 is reached by only 31 of 32 threads"),
        (
            "if (i > 1) threadgroup_barrier(mem_flags::mem_none);",
            "threadgroup_barrier at body:1 is reached by only 62 of 64",
        ),
        (
            "if (i < 32) threadgroup_barrier(mem_flags::mem_none);\nelse\nsimdgroup_barrier(mem_flags::mem_none);",
            "threadgroup_barrier at body:1 is reached by only 32 of 64 threads of the threadgroup",
        ),
        ("a[i] = simd_shuffle(1.0f, ushort(lane + 1));", "simd_shuffle at body:1 reads a lane that does not exist"),
    ],
)
def test_divergence_is_reported(body: str, message: str, mode: str) -> None:
    text = problems(body, mode)
    assert text.startswith("k: ")
    assert message in text


def test_a_shuffle_from_a_thread_that_is_not_there_is_reported() -> None:
    run("a[i] = simd_shuffle_xor(a[i], 1);", "plain", threads=40)
    assert "does not exist" in problems("a[i] = simd_shuffle_xor(a[i], 16);", "plain", threads=40)


# Arguments


def test_the_manifest_has_all_arguments() -> None:
    kernel = Library(compile_shader(SUMS)).kernel("two_sums")
    assert [(a.name, a.kind, a.index, a.writable) for a in kernel.arguments[:4]] == [
        ("x", "buffer", 0, False),
        ("sums", "buffer", 1, True),
        ("first_round", "threadgroup", 0, True),
        ("group", "builtin", 0, False),
    ]
    assert kernel.static_threadgroup_bytes == 1024
    rows = Library(compile_shader(source.SHADERS / "rotate.metal", {"TQ_HEAD_DIM": 64, "TQ_INPUT": "float"}))
    assert [a.size for a in rows.kernel("tq_rotate_rows").arguments[:3]] == [0, 0, 4]
    with pytest.raises(KeyError):
        rows.kernel("another")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffers": [np.zeros(256, np.float32)]}, r"buffer 1 \(sums\) is not bound"),
        ({"buffers": [np.zeros(8, np.uint8)[1:5], np.zeros(4, np.float32)]}, "not aligned to 4 bytes"),
        ({"threadgroup_memory": []}, r"threadgroup memory 0 \(first_round\) has no length"),
        ({"threadgroup_memory": [8]}, "not a multiple of 16"),
        ({"threadgroup_memory": [232448]}, "233472 bytes of threadgroup memory"),
        ({"threads": (1056, 1, 1)}, "1056 threads"),
        ({"grid": (0, 1, 1)}, "the grid is empty"),
    ],
)
def test_wrong_dispatches_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "buffers": [np.zeros(256, np.float32), np.zeros(4, np.float32)],
        "threadgroup_memory": [16],
    } | changes
    with pytest.raises(KernelError, match=message):
        Library(compile_shader(SUMS)).kernel("two_sums").dispatch(**arguments)


def test_buffers_that_overlap_stay_one() -> None:
    text = f"""{START}kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
        uint i [[thread_position_in_grid]]) {{ y[i] = x[i] + 1.0f; }}
"""
    for mode in CHECKED:
        x = np.arange(64, dtype=np.float32)
        Library(compile_shader(text, mode=mode)).kernel("k").dispatch([x, x], grid=(2, 1, 1))
        assert x.tolist() == list(range(1, 65))


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(CompileError, match=r"program_source:3:.*nothing"):
        compile_shader(START + "kernel void k(device float* a [[buffer(0)]]) { a[0] = nothing; }")
    with pytest.raises(CompileError, match="kernel k: cannot bind the argument 'uint i'"):
        compile_shader(START + "kernel void k(uint i) {}")


def test_the_command_line() -> None:
    command = [sys.executable, str(FOLDER / "compile.py"), "--mode", "plain", "-DTQ_HEAD_DIM=64", "-DTQ_INPUT=float"]
    text = (source.SHADERS / "rotate.metal").read_text()
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Library(Path(done.stdout.strip())).kernel("tq_rotate_rows").name == "tq_rotate_rows"
    done = subprocess.run(command, input="kernel void k() { nothing; }", capture_output=True, text=True)
    assert done.returncode == 1
    assert "program_source:1:" in done.stderr


# Barriers


def check_sums(text: str, mode: str, seed: int) -> None:
    threads, groups = 96, 3
    x, sums = torch.randn(groups, 2, threads), torch.full((groups, 2), math.nan)
    library = Library(compile_shader(text, mode=mode))
    library.kernel("two_sums").dispatch([x, sums], [16], (groups, 1, 1), (threads, 1, 1), seed)
    torch.testing.assert_close(sums, x.sum(-1) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_sums(mode: str) -> None:
    check_sums(SUMS.read_text(), mode, seed=5)


def test_barriers_are_found() -> None:
    text = """a();
// simdgroup_barrier(x);
threadgroup_barrier(mem_flags::mem_none |
                    mem_flags::mem_device); simdgroup_barrier(x);
"""
    found = source.barriers(text)
    assert [(barrier.name, barrier.line) for barrier in found] == [("threadgroup_barrier", 3), ("simdgroup_barrier", 4)]
    without = source.without_barrier(text, 0)
    assert without.count("\n") == text.count("\n")
    assert [(barrier.name, barrier.line) for barrier in source.barriers(without)] == [("simdgroup_barrier", 4)]


@pytest.mark.parametrize("index", range(3))
def test_every_barrier_that_is_taken_out_is_missed(index: int) -> None:
    """By the race detector, and by wrong results in some order."""
    text = source.without_barrier(SUMS.read_text(), index)
    with pytest.raises(KernelError, match=r"race|nobody has written"):
        check_sums(text, "race", seed=0)
    failures = 0
    for seed in range(20):
        try:
            check_sums(text, "plain", seed)
        except AssertionError:
            failures += 1
    assert failures > 0
