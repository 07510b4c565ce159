"""Builds the native library torch_tqattn/_C: operators and CPU kernels, loaded with torch.ops.load_library."""

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("torch_tqattn/csrc")
COMPILE_ARGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
if sys.platform != "darwin":
    # Only the compiler gets the flag: the OpenMP runtime must be the one that PyTorch has already loaded.
    COMPILE_ARGS.append("-fopenmp")

setup(
    ext_modules=[
        CppExtension(
            "torch_tqattn._C",
            sources=sorted(str(path) for folder in (CSRC, CSRC / "cpu") for path in folder.glob("*.cpp")),
            depends=[
                str(path) for pattern in ("csrc/**/*.h", "shaders/*.h") for path in Path("torch_tqattn").glob(pattern)
            ],
            extra_compile_args=COMPILE_ARGS,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
