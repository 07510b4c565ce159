"""Compiles CUDA C++ for any NVIDIA GPU, with no GPU at hand: NVIDIA's run-time compiler, from its package."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest


class CompileError(ValueError):
    """The source does not compile; the message is the compiler's."""


@cache
def _library() -> ctypes.CDLL | None:
    nvidia = importlib.util.find_spec("nvidia")
    folders = [] if nvidia is None else [Path(folder) for folder in nvidia.submodule_search_locations or ()]
    for folder in folders:
        for builtins in sorted(folder.glob("*/lib/libnvrtc-builtins.so.*")):
            libraries = sorted(builtins.parent.glob("libnvrtc.so.*"))
            if libraries:
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # the other looks for it by its name alone
                return ctypes.CDLL(str(libraries[0]))
    return None


def need() -> None:
    """Skip the test, or in continuous integration on Linux fail it, unless the compiler is there."""
    if _library() is None:
        message = "compiling the shaders for NVIDIA GPUs needs NVRTC: pip install nvidia-cuda-nvrtc"
        (pytest.fail if os.environ.get("CI") and sys.platform == "linux" else pytest.skip)(message)


def compile_source(source: str, macros: Mapping[str, object], architecture: str) -> bytes:
    """Machine code, made with the options of csrc/cuda/module.cpp. CompileError if there is an error or a warning."""
    nvrtc = _library()
    assert nvrtc is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space"]
    # It warns of comparisons in what a specialisation does not use.
    options += ["--generate-line-info", "--diag-suppress=186"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"shader", 0, None, None) == 0
    try:
        error = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if error != 0 or log.value:
            raise CompileError(log.value.decode())
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
