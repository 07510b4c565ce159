"""Builds the native library torch_tqattn/_C: operators, CPU kernels, and the MPS backend on macOS, the CUDA backend on
Linux. It is loaded with torch.ops.load_library.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("torch_tqattn/csrc")
GENERATED = Path("build/generated")

sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), *CSRC.glob("gpu/*.cpp")]
compile_args = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
link_args = []


def embed_shaders(name: str, *options: str) -> None:
    """Writes the header of this name, and lets the compiler find it."""
    subprocess.run([sys.executable, "scripts/embed_shaders.py", *options, str(GENERATED / name)], check=True)
    compile_args.append(f"-I{GENERATED.resolve()}")


if sys.platform == "darwin":
    sources += CSRC.glob("mps/*.mm")
    # torch's own objects are counted by hand, and its inline functions are wrong in code that is not.
    compile_args += ["-fno-objc-arc", "-DTQATTN_MPS"]
    link_args += ["-framework", "Metal", "-framework", "Foundation"]
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "14.0")  # torch's own
    os.environ.setdefault("ARCHFLAGS", "-arch arm64")  # a universal Python would compile for Intel too
    embed_shaders("shader_sources.h")
else:
    # Only the compiler gets the flag: the OpenMP runtime must be the one that PyTorch has already loaded.
    compile_args.append("-fopenmp")
    if torch.version.hip is None:  # AMD's devices call themselves cuda too, and get the reference
        # Nothing of CUDA is needed to build it, nor a GPU.
        sources += CSRC.glob("cuda/*.cpp")
        compile_args.append("-DTQATTN_CUDA")
        link_args.append("-ldl")
        embed_shaders("cuda_shader_sources.h", "--cuda")

setup(
    ext_modules=[
        CppExtension(
            "torch_tqattn._C",
            sources=sorted(str(path) for path in sources),
            depends=[
                str(path)
                for pattern in ("csrc/**/*.h", "shaders/*.h", "shaders/*.metal")
                for path in Path("torch_tqattn").glob(pattern)
            ],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
