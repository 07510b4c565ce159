"""Runs tests under the double in a process of its own, because torch asks only once whether there is an mps device."""

import os
import subprocess
import sys
from collections.abc import Sequence

from metal.executed.compile import compiler

from .objects import ROOT, MissingToolError


def _sanitisers() -> str:
    """The libraries that must be the first of a process whose shaders are compiled with sanitisers."""
    names = ("libasan.so", "libubsan.so")
    paths = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    if not all(os.path.isabs(path) for path in paths):
        raise MissingToolError(
            f"running sanitised shaders within Python needs g++ with its sanitisers, not {compiler()}"
        )
    return ":".join(paths)


def run(arguments: Sequence[str], mode: str = "plain", **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments, the double in place, shaders in this mode of metal/executed."""
    environment = {**os.environ, "TQATTN_HOSTED_MPS": "1", "TQATTN_METAL_MODE": mode, **variables}
    if mode == "sanitised":
        environment |= {"LD_PRELOAD": _sanitisers(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments]
    if mode == "sanitised":
        command.append("-s")  # what a sanitiser says as it ends the process would stay captured
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
