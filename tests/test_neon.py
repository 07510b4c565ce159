"""The CPU kernels for arm64, run where there is no such processor: a program of them alone, under emulation."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "torch_tqattn" / "csrc"
SOURCES = [
    *(ROOT / "tests" / "neon").glob("*.cpp"),
    CSRC / "cpu/baseline.cpp",
    CSRC / "cpu/levels.cpp",
    CSRC / "format.cpp",
]
INCLUDES = [CSRC, Path(torch.__file__).parent / "include"]
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


NATIVE = ["c++"]
ARM64 = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static"]


def results(compiler: list[str], program: Path, *emulator: str) -> tuple[str, np.ndarray]:
    """What the kernels say that they are, and all numbers that they compute."""
    # PyTorch declares glibc's __assert_fail where assertions are off; for arm64 this is another C library.
    options = ["-std=c++20", "-O1", "-UNDEBUG", "-Wno-psabi", *(f"-I{path}" for path in INCLUDES)]
    subprocess.run([*compiler, *options, *map(str, SOURCES), "-o", str(program)], check=True)
    out = program.with_suffix(".bin")
    run = subprocess.run([*emulator, str(program), str(out)], check=True, capture_output=True, text=True)
    return run.stdout.strip(), np.fromfile(out, np.float32)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="every other test runs NEON here")
@pytest.mark.skipif(EMULATOR is None, reason="qemu-aarch64 runs it: install qemu-user-static")
def test_neon_computes_what_sse2_computes(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    assert EMULATOR is not None
    name, expected = results(NATIVE, tmp_path / "native")
    other, got = results(ARM64, tmp_path / "arm64", EMULATOR)
    assert (name, other) == ("baseline", "NEON")
    assert expected.shape == got.shape
    # Sums in the same order; only some multiply-adds round once rather than twice.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
