"""Compiles with zig's clang, and finds what was compiled before by its content."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "metal"
GENERATED = ROOT / "build" / "generated"  # setup.py's own
PACKAGE = ROOT / "torch_tqattn"
ZIG = [sys.executable, "-m", "ziglang", "c++"]
# Apple's declarations, for Linux and for macOS.
HEADERS = Path(__file__).resolve().parent / "headers"
# What comes with zig for macOS.
LINUX_HEADERS = Path(__file__).resolve().parent / "linux"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]+"([^"]+)"', re.M)


class MissingToolError(RuntimeError):
    """Something that the build needs is not here; the message says where to get it."""


def check_zig() -> None:
    """Raises MissingToolError if there is no zig."""
    if importlib.util.find_spec("ziglang") is None:
        raise MissingToolError("zig compiles Objective-C++ here, and is missing: pip install ziglang")


def run(command: Sequence[str], folder: Path = ROOT) -> None:
    """Runs the command. Raises RuntimeError with all it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def digest(parts: Iterable[str | bytes]) -> str:
    """A short name for all these parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:24]


def make(output: Path, write: Callable[[Path], None]) -> Path:
    """The output, made by write(path) if it is not there: whole or not at all, whoever else makes it too."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}{output.suffix}")
        write(partial)
        partial.replace(output)
    return output


def embed_shaders() -> Path:
    """The folder with the header that holds the shaders' sources."""
    run([sys.executable, str(ROOT / "scripts" / "embed_shaders.py"), str(GENERATED / "shader_sources.h")])
    return GENERATED


def _inputs(source: Path, folders: Sequence[Path]) -> set[Path]:
    """The source and the files of the project that it includes in quotes, which are next to it or in `folders`."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in _INCLUDE.findall(file.read_text()):
            places = [(place / name).resolve() for place in (file.parent, *folders)]
            waiting.extend([place for place in places if place.exists()][:1])
    return found


def compile_all(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    """The object files of these sources."""
    searched = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    declared = [path for where in (HEADERS, LINUX_HEADERS) for path in where.rglob("*.h")]

    def compile_one(source: Path) -> Path:
        inputs = sorted({*_inputs(source, searched), *declared})
        name = digest([str(source), *flags, *[part for path in inputs for part in (str(path), path.read_bytes())]])
        command = [*ZIG, *flags, "-c", str(source), "-o"]
        return make(folder / f"{source.stem}-{name}.o", lambda output: run([*command, str(output)]))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))
