"""Compile a shader for the CPU, as a shared object that kernel_abi.h describes. Results are kept and used again.

    python tests/metal/executed/compile.py [--mode plain] [-DNAME=VALUE ...] [FILE]

reads the shader from FILE or the standard input, and prints the path of the shared object, or on the standard error
what the compiler says, with exit code 1.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metal import source
from metal.executed import manifest

HERE = Path(__file__).resolve().parent
BUILD = source.ROOT / "build" / "metal"
METAL_VERSION = "310"

_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g1", "-w"]
# mode: flags of all parts, flags of the shader alone
MODES: dict[str, tuple[list[str], list[str]]] = {
    "plain": (["-O1"], []),
    "sanitised": (["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMSL_COPIES=1"], []),
    "race": (["-O1", "-DMSL_COPIES=1", "-DMSL_RACE=1"], ["-fsanitize=thread"]),
}

_SHADER = """#include <metal_stdlib>
#include "binding.h"
#include "keywords.h"
namespace metal {{
namespace msl_shader {{
{shader}
# 1 "bindings"
{bindings}
}}
}}
static const MslKernel* const* const msl_kernels = metal::msl_shader::msl_kernels;
#define MSL_EXPORT extern "C" __attribute__((visibility("default")))
MSL_EXPORT const MslKernel* msl_kernel_at(uint32_t index) {{ return index < {count} ? msl_kernels[index] : nullptr; }}
MSL_EXPORT const MslKernel* msl_find_kernel(const char* name) {{
  for (uint32_t i = 0; i < {count}; ++i) {{
    if (__builtin_strcmp(msl_kernels[i]->name, name) == 0) return msl_kernels[i];
  }}
  return nullptr;
}}
"""


class CompileError(ValueError):
    """The shader does not compile; the message is the compiler's."""


@lru_cache
def compiler() -> str:
    """The C++ compiler: $CXX, or c++; RuntimeError if there is none."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise RuntimeError("executing shaders needs a C++ compiler: install one (g++ or clang++) or set CXX")
    return found


@lru_cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@lru_cache
def _tools_hash() -> str:
    """Of everything but the shader that a result depends on."""
    digest = hashlib.sha256(f"{_compiler_version()} {platform.machine()} {MODES} {_COMMON} {_SHADER}".encode())
    for path in sorted([*HERE.rglob("*.h"), *HERE.rglob("*.cpp"), HERE / "include" / "metal_stdlib"]):
        digest.update(path.read_bytes())
    digest.update((HERE.parent / "functions.h").read_bytes())
    return digest.hexdigest()


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(done.stderr)
    return done.stdout


def _build_once(name: str, text: str, command: list[str]) -> Path:
    """build/metal/<name>, made by the command with the text as its input unless it is there."""
    result = BUILD / name
    if not result.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / name
            _run([*command, "-o", str(made)], text)
            made.replace(result)
    return result


def _part(file: str, mode: str) -> Path:
    """The object file of one of the C++ files here."""
    command = [compiler(), *_COMMON, *MODES[mode][0], "-c", str(HERE / file)]
    return _build_once(f"{Path(file).stem}-{mode}-{_tools_hash()[:16]}.o", "", command)


def driver(mode: str) -> Path:
    """The program that runs kernels of this mode in a process of its own."""
    command = [compiler(), *_COMMON, *MODES[mode][0], str(HERE / "driver.cpp"), "-ldl"]
    return _build_once(f"driver-{mode}-{_tools_hash()[:16]}", "", command)


def preprocess(shader: str | Path, macros: Mapping[str, object]) -> str:
    """The shader's text, or that of a file, after the preprocessor, with line markers."""
    # Metal calls a text in memory by this name.
    name, text, folder = "program_source", shader, source.SHADERS
    if isinstance(shader, Path):
        name, text, folder = str(shader), shader.read_text(), shader.parent
    defines = {"MSL_PREPROCESSING": 1, "__METAL_VERSION__": METAL_VERSION, **macros}
    flags = [
        "-nostdinc",
        *(f"-D{name}={value}" for name, value in defines.items()),
        f"-I{folder}",
        f"-I{HERE / 'include'}",
    ]
    return _run([compiler(), "-E", "-x", "c++", *flags, "-"], f'#line 1 "{name}"\n{text}')


def compile_shader(shader: str | Path, macros: Mapping[str, object] | None = None, mode: str = "plain") -> Path:
    """The shared object of a shader.

    Args:
        shader: its text, or its file.
        macros: preprocessor macros, as MTLCompileOptions.preprocessorMacros.
        mode: "plain", "sanitised" (address and undefined behaviour; runs in a process of its own) or "race".

    Raises:
        CompileError: the shader does not compile.
        RuntimeError: no C++ compiler.
    """
    text = preprocess(shader, macros or {})
    try:
        kernels = source.kernels(text)
    except ValueError as error:
        raise CompileError(str(error)) from error
    cpp = _SHADER.format(shader=manifest.as_cpp(text), bindings=manifest.bindings(kernels), count=len(kernels))
    name = hashlib.sha256((cpp + _tools_hash()).encode()).hexdigest()[:24]
    common, own = MODES[mode]
    parts = [str(_part(file, mode)) for file in ("runtime.cpp", *(["race.cpp"] if mode == "race" else []))]
    if mode == "race" and "clang" in _compiler_version():
        own = [*own, "-mllvm", "-tsan-instrument-read-before-write=1"]  # else it leaves out reads that a write follows
    command = [compiler(), *_COMMON, *common, *own, f"-I{HERE / 'include'}", "-x", "c++", "-c", "-"]
    compiled = _build_once(f"{name}-{mode}.o", cpp, command)
    return _build_once(f"{name}-{mode}.so", "", [compiler(), *common, "-shared", str(compiled), *parts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="plain")
    parser.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--replace", nargs=2, metavar=("OLD", "NEW"), help="a fault to put into the text")
    parser.add_argument("file", nargs="?", type=Path)
    arguments = parser.parse_args()
    macros = {name: value or "1" for name, _, value in (macro.partition("=") for macro in arguments.macros)}
    shader = arguments.file or sys.stdin.read()
    if arguments.replace:
        text = shader.read_text() if isinstance(shader, Path) else shader
        shader = text.replace(*arguments.replace)
    try:
        print(compile_shader(shader, macros, arguments.mode))
    except (CompileError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
