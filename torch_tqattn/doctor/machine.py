"""What the doctor says of the machine."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import format as fmt
from ..ops import OPERATORS

DEVICES = ("cpu", "mps", "cuda")
# What changes how the package, torch's devices and Apple's drivers work.
VARIABLES = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ENABLE_MPS_FALLBACK")
VARIABLE_PREFIXES = ("TQATTN_", "PYTORCH_MPS_", "PYTORCH_DEBUG_MPS_", "MTL_", "METAL_")


def attempt(read: Callable[[], Any]) -> str:
    """What this gives, or why it gives nothing: no part of the report is worth losing the rest."""
    try:
        return str(read())
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def torch_build() -> str:
    mps = "with" if torch.backends.mps.is_built() else "without"
    cuda = "without" if torch.version.cuda is None else "with"
    return f"{torch.__version__}, built {mps} mps and {cuda} cuda {torch.version.cuda or ''}".rstrip()


def libraries() -> str:
    return ", ".join(sorted(str(path) for path in torch.ops.loaded_libraries))


def environment() -> str:
    names = [name for name in sorted(os.environ) if name in VARIABLES or name.startswith(VARIABLE_PREFIXES)]
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "nothing that matters is set"


def mps_device() -> str:
    mps = torch.backends.mps
    return (
        f"{mps.get_name()}, {mps.get_core_count()} cores, {torch.mps.recommended_max_memory() / 1e9:.1f} GB for torch"
    )


def cuda_device() -> str:
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def is_here(device: str) -> bool:
    if device == "cpu":
        return True
    return torch.backends.mps.is_available() if device == "mps" else torch.cuda.is_available()


def kernels(device: str) -> str:
    """Whether the operators have kernels of their own on this device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    count = sum(has_kernel(f"tqattn::{name}", device.upper()) for name in OPERATORS)
    return f"kernels for {count} of {len(OPERATORS)} operators" + ("" if count else ": the PyTorch reference runs")


def description() -> Iterator[tuple[str, str]]:
    """What the report begins with: names and what they are on this machine."""
    version = attempt(partial(metadata.version, "torch_tqattn"))
    yield "torch_tqattn", f"{version}, format version {fmt.FORMAT_VERSION}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    yield "torch", attempt(torch_build)
    yield "system", attempt(lambda: f"{platform.platform()}, {platform.machine()}")
    yield "processor", attempt(lambda: f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    yield "instructions", attempt(lambda: f"{torch.backends.cpu.get_cpu_capability()} at most, says torch")
    yield "libraries", attempt(libraries)
    yield "environment", environment()
    yield "cpu", attempt(partial(kernels, "cpu"))
    for device, describe in (("mps", mps_device), ("cuda", cuda_device)):
        yield device, f"{attempt(describe)}; {attempt(partial(kernels, device))}" if is_here(device) else "none"
