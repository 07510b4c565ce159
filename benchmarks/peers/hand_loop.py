"""hand_loop.cpp, compiled when the benchmark starts: the least that attention over 4-bit codes costs here."""

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torch_tqattn import format as fmt

SOURCE = Path(__file__).with_name("hand_loop.cpp")
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
GROUP = 4  # query heads of a KV head
BLOCK = 64  # positions
Codes = tuple[Tensor, Tensor, Tensor, Tensor]  # codes and norms of K, then of V


def missing(head_dim: int, context: int, heads: int, kv_heads: int) -> str | None:
    """Why there is no such loop, if there is none."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() not in FLAGS:
        return "it is for x86 with AVX2 or AVX-512"
    if head_dim not in (128, 256) or heads != GROUP * kv_heads or context % BLOCK:
        return f"it is for head dims 128 and 256, {GROUP} heads a KV head and whole blocks of {BLOCK}"
    return None


def compiled() -> Callable[[Tensor, Codes, Tensor, Tensor], None]:
    """The function (q, codes, levels, out), for the instruction set that PyTorch uses."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-O3", "-std=c++17", "-mtune=native", *FLAGS[torch.backends.cpu.get_cpu_capability()], "-fPIC", "-fopenmp"]
    with tempfile.TemporaryDirectory() as folder:
        made, library = Path(folder) / "hand_loop.o", Path(folder) / "hand_loop.so"
        subprocess.run([*compiler, *flags, "-c", str(SOURCE), "-o", str(made)], check=True)
        # Linked without -fopenmp: its threads are those that PyTorch has already started.
        subprocess.run([*compiler, "-shared", str(made), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).hand_loop

    def attend(q: Tensor, codes: Codes, levels: Tensor, out: Tensor) -> None:
        kv_heads, length, _ = codes[0].shape
        tensors = (ctypes.c_void_p(x.data_ptr()) for x in (levels, *codes, q, out))
        if function(q.shape[-1], kv_heads, ctypes.c_int64(length), *tensors):
            raise ValueError(f"no hand-written loop for q {list(q.shape)} and {length} positions")

    check(attend)
    return attend


def random_codes(head_dim: int, context: int, kv_heads: int) -> Codes:
    def side() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (kv_heads, context, head_dim // 2), dtype=torch.uint8)
        return codes, torch.rand(kv_heads, context) + 0.5

    return (*side(), *side())


def call(q: Tensor, context: int, kv_heads: int, copies: int) -> Callable[[int], object]:
    """Attention of q [1, heads, 1, head_dim] over random codes."""
    attend = compiled()
    caches = [random_codes(q.shape[-1], context, kv_heads) for _ in range(copies)]
    levels, out = fmt.levels(4).float(), torch.empty_like(q)
    return lambda i: attend(q, caches[i % copies], levels, out)


def check(attend: Callable[[Tensor, Codes, Tensor, Tensor], None]) -> None:
    """Compare it with float64."""
    for head_dim in (128, 256):
        levels, codes = fmt.levels(4).float(), random_codes(head_dim, 3 * BLOCK, 2)
        q = torch.randn(2, GROUP, head_dim)
        out = torch.empty_like(q)
        attend(q, codes, levels, out)
        k, v = (dense(codes[i], codes[i + 1], levels) for i in (0, 2))
        expected = torch.softmax(q.double() @ k.mT / head_dim**0.5, -1) @ v
        error = ((out - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            raise RuntimeError(f"the hand-written loop is wrong by {error:.1e}")


def dense(codes: Tensor, norms: Tensor, levels: Tensor) -> Tensor:
    indices = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    return levels.double()[indices] * norms.double()[..., None]
