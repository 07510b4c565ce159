"""Builds the double of Metal, and Objective-C++ extensions against it, as Linux libraries that torch can load.

zig's clang compiles, because gcc does not know Apple's Objective-C; g++ links and lends its C++ library, which is the
one torch is built with.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from metal.mutations import Mutation

from .objects import (
    BUILD,
    HEADERS,
    LINUX_HEADERS,
    PACKAGE,
    MissingToolError,
    check_zig,
    compile_all,
    digest,
    embed_shaders,
    make,
    run,
)

HERE = Path(__file__).resolve().parent
CSRC = PACKAGE / "csrc"
TORCH = Path(torch.__file__).parent
# torch_tqattn's own library has these, once for all devices.
SHARED = {"schema.cpp", "autograd.cpp"}


def check_tools() -> None:
    """Raises MissingToolError if this machine cannot build the double."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise MissingToolError("the double of Metal runs on Linux on x86-64")
    check_zig()
    if shutil.which("g++") is None:
        raise MissingToolError("g++ links the double of Metal, and is missing")


@cache
def _flags() -> list[str]:
    search = subprocess.run(["g++", "-E", "-v", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True)
    listed = search.stderr.split("search starts here:")[-1].split("End of search list")[0].split()
    # Before zig's own: <cstdlib> includes the next <stdlib.h>.
    cxx = [f"-I{folder}" for folder in listed if "c++" in folder]
    return [
        *["-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Werror"],
        *["-fobjc-runtime=macosx-14.0", "-fno-objc-arc", "-fblocks"],
        *["-nostdinc++", *cxx, f"-I{HEADERS}", f"-I{LINUX_HEADERS}"],
        *["-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include")],
    ]


def link(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """The library of these sources, against the double."""
    return _link(name, sources, flags, [double()])


def _link(name: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[Path]) -> Path:
    check_tools()
    folder = BUILD / f"hosted-torch-{torch.__version__}"
    inputs = [str(path) for path in (*compile_all(sources, [*_flags(), *flags], folder), *libraries)]
    options = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-shared", "-Wl,-z,defs", *inputs, *options, "-o"]
    return make(folder / f"{name}-{digest(inputs)}.so", lambda output: run([*command, str(output)]))


@cache
def double() -> Path:
    """The library of the double."""
    return _link("double", [*sorted(HERE.glob("*.mm")), HERE / "aten.cpp"], [], [])


def backend(mutation: Mutation | None = None) -> Path:
    """The library of torch_tqattn's MPS backend, with this fault unless it is one of a shader: load it after the double
    and after torch_tqattn's own."""
    prelude = HERE / "operators_for_mps.h"
    sources = [path for path in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("gpu/*.cpp")]) if path.name not in SHARED]
    sources += sorted((CSRC / "mps").glob("*.mm"))
    flags = [f"-I{embed_shaders()}", "-include", str(prelude), f"-DPRELUDE={digest([prelude.read_bytes()])}"]
    if mutation is not None and not mutation.is_of_shader:
        return _mutated_backend(sources, flags, mutation)
    return link("backend", sources, flags)


def _mutated_backend(sources: list[Path], flags: list[str], mutation: Mutation) -> Path:
    text = mutation.mutated()
    copy = BUILD / "mutations" / digest([text]) / mutation.path.name
    make(copy, lambda output: output.write_text(text))
    # Its own folder's headers, which it includes in quotes.
    (object_file,) = compile_all([copy], [*_flags(), *flags, f"-I{mutation.path.parent}"], copy.parent)
    others = [path for path in sources if path != mutation.path]
    return _link("backend", others, flags, [object_file, double()])
