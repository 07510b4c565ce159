"""torch's own wheels for macOS: their headers and libraries are what is compiled and linked with."""

import os
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

from metal.hosted.objects import MissingToolError

from .macho import MachO

# The oldest release with what the MPS backend needs, and the newest; .github/workflows/wheels.yml has all between them.
VERSIONS = ("2.12.0", "2.15.0")
PLATFORM = "macosx_14_0_arm64"
CACHE = Path(os.environ.get("TQATTN_CACHE", Path.home() / ".cache" / "torch_tqattn"))
WANTED = re.compile(r"torch/(include/.*|lib/.*\.dylib|utils/cpp_extension\.py)")
# What an extension links with.
LIBRARIES = ("libtorch", "libtorch_cpu", "libc10")


def fetch(version: str) -> Path:
    """The unpacked folder torch/ of that version; downloaded (about 130 MB) if it is not in the cache. Raises
    MissingToolError if it cannot be had."""
    folder = CACHE / f"torch-{version}-{PLATFORM}"
    done = folder / "complete"
    if not done.exists():
        with zipfile.ZipFile(_download(version)) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if WANTED.fullmatch(name)])
        done.touch()
    return folder / "torch"


def _download(version: str) -> Path:
    pattern = f"torch-{version}-*-{PLATFORM}.whl"
    if not list(CACHE.glob(pattern)):
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", PLATFORM, "--python-version", "3.12", "--dest", str(CACHE), f"torch=={version}"]
        if subprocess.run(command, check=False).returncode != 0:
            raise MissingToolError(f"torch {version} for macOS could not be downloaded to {CACHE}")
    return next(CACHE.glob(pattern))


def libraries(torch: Path) -> list[MachO]:
    return [MachO(torch / "lib" / f"{name}.dylib") for name in LIBRARIES]


def system_imports(torch: Path) -> dict[str, set[str]]:
    """What torch's libraries take from macOS, by the path of the library: all of it is there on macOS 14, which torch
    supports."""
    symbols: dict[str, set[str]] = defaultdict(set)
    for library in libraries(torch):
        for wanted in library.imports:
            if wanted.library.startswith("/"):
                symbols[wanted.library].add(wanted.symbol)
    return dict(symbols)
