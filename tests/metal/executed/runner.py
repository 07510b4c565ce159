"""Dispatch kernels of compiled shaders on arrays and CPU tensors.

library = Library(compile_shader(path, {"TQ_HEAD_DIM": 64}, mode="race"))
library.kernel("tq_rotate_rows").dispatch([x, y, np.uint32(rows)], grid=(4, 1, 1), threads=(64, 1, 1), seed=1)
"""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metal.executed.compile import driver

MAX_BINDINGS = 31
ERROR_BYTES = 1 << 14
KINDS = ("buffer", "threadgroup", "builtin")


class KernelError(RuntimeError):
    """The kernel did something that it must not do; the message says what and where."""


class _Argument(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("index", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("alignment", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
    ]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("buffer_bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("buffer_count", ctypes.c_uint32),
        ("threadgroup_bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("threadgroup_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("arguments", ctypes.POINTER(_Argument)),
        ("argument_count", ctypes.c_uint32),
        ("static_threadgroup_bytes", ctypes.c_uint64),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Dispatch))),
    ]


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel; kind is one of KINDS, size that of a struct behind a reference, else 0."""

    name: str
    kind: str
    index: int
    size: int
    writable: bool


def _memory(buffer: Any) -> tuple[Any, int, int]:
    """What keeps the memory alive, its address, its bytes. Numbers are copied, arrays and tensors are not."""
    if hasattr(buffer, "data_ptr"):
        if not buffer.is_contiguous():
            raise ValueError("tensors must be contiguous")
        return buffer, buffer.data_ptr(), buffer.numel() * buffer.element_size()
    if isinstance(buffer, (np.generic, bytes)):
        buffer = np.frombuffer(buffer if isinstance(buffer, bytes) else buffer.tobytes(), np.uint8).copy()
    if not isinstance(buffer, np.ndarray) or not buffer.flags.c_contiguous:
        raise ValueError(f"buffers are contiguous arrays or tensors, numpy numbers or bytes, not {type(buffer)}")
    return buffer, buffer.ctypes.data, buffer.nbytes


class Kernel:
    """One kernel of a library. Its arguments are not known in mode "sanitised"."""

    def __init__(self, library: "Library", name: str, loaded: _Kernel | None) -> None:
        self._library = library
        self._loaded = loaded
        self.name = name
        self.arguments: list[Argument] = []
        self.static_threadgroup_bytes = 0
        if loaded is not None:
            self.static_threadgroup_bytes = loaded.static_threadgroup_bytes
            self.arguments = [
                Argument(a.name.decode(), KINDS[a.kind], a.index, a.size, bool(a.writable))
                for a in (loaded.arguments[i] for i in range(loaded.argument_count))
            ]

    def dispatch(
        self,
        buffers: Sequence[Any] | Mapping[int, Any],
        threadgroup_memory: Sequence[int] = (),
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: tuple[int, int, int] = (32, 1, 1),
        seed: int = 0,
    ) -> None:
        """Run the kernel; it writes to the buffers.

        Args:
            buffers: by index: contiguous numpy arrays or CPU tensors, numpy numbers or bytes, None for none.
            threadgroup_memory: lengths in bytes, by index.
            grid: threadgroups.
            threads: threads of a threadgroup.
            seed: of the order of threadgroups, threads and reductions, and of what unwritten memory holds.

        Raises:
            KernelError: what the kernel did wrong.
        """
        bound = dict(enumerate(buffers)) if isinstance(buffers, Sequence) else dict(buffers)
        memory = {index: _memory(buffer) for index, buffer in bound.items() if buffer is not None}
        lengths = [*threadgroup_memory, *[0] * (MAX_BINDINGS - len(threadgroup_memory))]
        run = self._run_apart if self._loaded is None else self._run_here
        problem = run(memory, lengths, grid, threads, seed)
        if problem:
            raise KernelError(self._library.with_source_lines(problem))

    def _run_here(
        self,
        memory: dict[int, tuple[Any, int, int]],
        lengths: list[int],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        seed: int,
    ) -> str:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        addresses = (ctypes.c_void_p * MAX_BINDINGS)(*(memory.get(i, (0, None))[1] for i in range(MAX_BINDINGS)))
        sizes = (ctypes.c_uint64 * MAX_BINDINGS)(*(memory.get(i, (0, 0, 0))[2] for i in range(MAX_BINDINGS)))
        dispatch = _Dispatch(
            addresses,
            sizes,
            MAX_BINDINGS,
            (ctypes.c_uint64 * MAX_BINDINGS)(*lengths),
            MAX_BINDINGS,
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threads),
            seed,
            ctypes.cast(error, ctypes.c_char_p),
            ERROR_BYTES,
        )
        assert self._loaded is not None
        failed = self._loaded.run(ctypes.byref(dispatch))
        return error.value.decode() if failed else ""

    def _run_apart(
        self,
        memory: dict[int, tuple[Any, int, int]],
        lengths: list[int],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        seed: int,
    ) -> str:
        with tempfile.TemporaryDirectory() as folder:
            files = ["-"] * MAX_BINDINGS
            for index, (_, address, size) in memory.items():
                files[index] = f"{folder}/{index}"
                Path(files[index]).write_bytes(ctypes.string_at(address, size))
            words = [str(self._library.path), self.name, str(seed), *map(str, (*grid, *threads, *lengths)), *files]
            # What a fiber leaves on its stack when a dispatch is stopped is not a leak.
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            command = [str(driver(self._library.mode)), *words]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            for index, (_, address, size) in memory.items():
                contents = Path(files[index]).read_bytes()
                ctypes.memmove(address, contents, size)
        return f"{self.name}: exit code {done.returncode}\n{done.stderr}" if done.returncode != 0 else ""


class Library:
    """A compiled shader: the result of compile_shader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mode = path.stem.rsplit("-", 1)[1]
        self._find: Any = None
        # A sanitiser's run-time library must be the first that a process loads.
        if self.mode != "sanitised":
            self._find = ctypes.CDLL(str(path)).msl_find_kernel
            self._find.argtypes, self._find.restype = [ctypes.c_char_p], ctypes.POINTER(_Kernel)

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name; KeyError if there is none (in mode "sanitised", KernelError when it runs)."""
        if self._find is None:
            return Kernel(self, name, None)
        found = self._find(name.encode())
        if not found:
            raise KeyError(name)
        return Kernel(self, name, found.contents)

    def with_source_lines(self, text: str) -> str:
        """The text with source lines for the code addresses in it, where the tool that knows them is installed."""
        tool = shutil.which("addr2line")
        if tool is None:
            return text

        def line(match: re.Match[str]) -> str:
            command = [tool, "-s", "-e", str(self.path), match[1]]
            place = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            return place.split(" (")[0]

        return re.sub(r"\{\+(0x[0-9a-f]+)\}", line, text)
