"""`python -m torch_tqattn doctor`: what a bug report needs; runs every operator on every device that is here."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import format as fmt
from . import reference, reference_seed
from .ops import OPERATORS

DEVICES = ("cpu", "mps", "cuda")
# What changes how the package, torch's devices and Apple's drivers work.
VARIABLES = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ENABLE_MPS_FALLBACK")
VARIABLE_PREFIXES = ("TQATTN_", "PYTORCH_MPS_", "PYTORCH_DEBUG_MPS_", "MTL_", "METAL_")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE, SINK_LENGTH = 32, 4
LENGTH = 607  # positions in a store: enough for several simdgroups, and one token short of a whole block
FIRST = 400  # of them, stored by the first of two calls
SLOTS, TAIL_SLOTS = 640, 40
# Float32 rounds a number by at most half of this: what may come on top where plain PyTorch happens to round nothing.
ROUNDING = 2.0**-23
# By how much queries of 16 bits, once they are rotated, and their weights are rounded on top of that: to half precision
# on CUDA; on the CPU, with AVX-512, to steps of 2^-15 of the largest.
ROUNDING_OF_QUERIES = {"cuda": 2.0**-11, "cpu": 2.0**-16}
# What two encoders lose differs by less: a number on a threshold, or rounded to half, may fall to the other side.
STORED = 2.0**-10


@dataclass(frozen=True)
class Case:
    """A cache to check: its head dim, its formats, and whether blocks have means (else each token is coded alone)."""

    head_dim: int
    k_format: str
    v_format: str
    block_size: int = BLOCK_SIZE

    def __str__(self) -> str:
        return f"{self.k_format}/{self.v_format} D={self.head_dim}" + ("" if self.block_size else " no blocks")


_NAMES = tuple(fmt.FORMATS)
# Every format for K and for V, and every head dim.
CASES = (
    *(Case(128, k, v) for k, v in pairwise((*_NAMES, _NAMES[0]))),
    *(Case(head_dim, "tq8", "tq4") for head_dim in fmt.HEAD_DIMS),
    Case(128, "tq8", "tq4", block_size=0),
)
FEATURES = Case(128, "tq8", "tq4")  # where options of attention are checked
SEED_HEAD_DIMS = (256, 512)
SEED_BITS = (4, 5, 6, 8)


@dataclass
class Probe:
    """Runs operators on a device with arguments from the CPU, and holds what they give against what is exact."""

    device: str
    seconds: float | None = None  # that the first call took: on a GPU, with the compilation of its shaders
    results: list[tuple[float, float]] = field(default_factory=list)  # errors and their bounds

    def call(self, name: str, *arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
        """The operator's results, and the arguments after the call, on the CPU."""
        there = [x.to(self.device, copy=True) if isinstance(x, Tensor) else x for x in arguments]
        options = {key: x.to(self.device) if isinstance(x, Tensor) else x for key, x in options.items()}
        synchronise(self.device)
        begin = time.perf_counter()
        results = getattr(torch.ops.tqattn, name)(*there, **options)
        synchronise(self.device)
        if self.seconds is None:
            self.seconds = time.perf_counter() - begin
        if isinstance(results, tuple):
            results = tuple(x.cpu() for x in results)
        elif results is not None:
            results = results.cpu()
        return results, [x.cpu() if isinstance(x, Tensor) else x for x in there]

    def compare(self, got: Tensor, plain: Tensor, exact: Tensor, rounding: float = ROUNDING) -> None:
        """Note the operator's error, and that it may be twice the error of the same in plain float32 PyTorch."""
        if (got.dtype, got.shape) != (plain.dtype, plain.shape):
            raise ValueError(f"gave {got.dtype} {list(got.shape)} instead of {plain.dtype} {list(plain.shape)}")
        self.results.append((relative_error(got, exact), 2 * relative_error(plain, exact) + rounding))

    def compare_stored(self, got: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Note by how much what storing lost of rows differs from what it loses with the reference."""
        self.results.append((abs(relative_error(got, exact) / relative_error(plain, exact) - 1), STORED))

    def worst(self) -> tuple[float, float]:
        """The error that is largest for its bound, or is no number, and that bound."""
        return max(self.results, key=lambda result: float("inf") if result[0] != result[0] else result[0] / result[1])


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[Probe], None]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def synchronise(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


# What is exact: the definitions in float64


def rotate_exactly(x: Tensor, inverse: bool = False) -> Tensor:
    head_dim = x.shape[-1]
    matrix = fmt.signs(head_dim).double()[:, None] * fmt.hadamard(head_dim) / head_dim**0.5
    return x.double() @ (matrix.T if inverse else matrix)


def decode_exactly(stores: list[Any], held: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rotated rows of K and V: levels, which are float32 numbers, times norms, plus means."""
    wide = [x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in stores]
    decode: Callable[..., Any] = reference.decode_kv
    k, v = decode(*wide, *held, rotated=True)
    return k.double(), v.double()


def attend_exactly(
    q: Tensor,
    stores: list[Any],
    held: tuple[int, ...],
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    k, v = decode_exactly(stores, (q.shape[-1], *held))
    start, _, length = held[:3]
    position, query = torch.arange(start, length), torch.arange(length - q.shape[2], length)[:, None]
    visible = (position <= query)[None]
    if window:
        visible = visible & (position > query - window)
    if mask is not None:
        visible = visible & mask
    scale = q.shape[-1] ** -0.5
    out, lse = reference.softmax_attention(rotate_exactly(q), k, v, visible, scale, softcap, sinks)
    return rotate_exactly(out, inverse=True), lse


# Checks of the general operators


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty_side(case: Case, format_name: str) -> list[Tensor | None]:
    """Codes, norms, means and tail of one side: zeros, for 2 sequences of 2 heads."""
    storage, head_dim = fmt.FORMATS[format_name], case.head_dim
    groups = storage.norms_per_row(head_dim)
    codes = torch.zeros(2, 2, SLOTS, storage.row_bytes(head_dim), dtype=torch.uint8)
    norms = torch.zeros((2, 2, SLOTS, groups) if groups > 1 else (2, 2, SLOTS)) if groups else None
    blocks = SLOTS // case.block_size if case.block_size and storage.is_coded else 0
    means = torch.zeros(2, 2, blocks, head_dim, dtype=torch.half) if blocks else None
    tail_slots = SINK_LENGTH + TAIL_SLOTS if case.block_size else 0
    tail = torch.zeros(2, 2, tail_slots, head_dim, dtype=torch.half) if tail_slots else None
    return [codes if storage.is_coded else torch.zeros(2, 2, SLOTS, head_dim, dtype=torch.half), norms, means, tail]


@dataclass
class Example:
    """Tokens, and stores that the reference has filled with them on the CPU."""

    case: Case
    encode: str = "fast"

    def __post_init__(self) -> None:
        self.k, self.v = random(2, 2, 2, LENGTH + 1, self.case.head_dim)
        self.k += 2 * random(self.case.head_dim, seed=1)  # means that are worth keeping
        self.sink_length = SINK_LENGTH if self.case.block_size else 0
        self.stores = self.filled(reference.encode_kv_)

    def coded(self, length: int) -> int:
        return length // self.case.block_size * self.case.block_size if self.case.block_size else length

    def held(self, length: int = LENGTH) -> tuple[int, ...]:
        """start, coded, length, block_size and sink_length of stores with so many tokens."""
        return (0, self.coded(length), length, self.case.block_size, self.sink_length)

    def filled(self, encode_kv_: Callable[..., Any]) -> list[Any]:
        """Stores that two calls of this function have filled; what it gives back takes the place of its arguments."""
        case = self.case
        sides = [*empty_side(case, case.k_format), *empty_side(case, case.v_format)]
        stores = [*sides, case.k_format, case.v_format]
        for begin, end in ((0, FIRST), (FIRST, LENGTH)):
            tokens = (self.k[:, :, begin:end], self.v[:, :, begin:end])
            positions = (begin, self.coded(begin), self.coded(end), case.block_size, self.sink_length, None)
            stores = encode_kv_(*tokens, *stores, *positions, self.encode) or stores
        return stores


def check_rotate(probe: Probe, head_dim: int, dtype: torch.dtype) -> None:
    x = random(3, 7, head_dim).to(dtype)
    for inverse in (False, True):
        got, _ = probe.call("rotate", x, inverse)
        probe.compare(got, reference.rotate(x, inverse), rotate_exactly(x, inverse))


def check_encode(probe: Probe, case: Case) -> None:
    for encode in fmt.ENCODES:
        example = Example(case, encode)
        stores = example.filled(lambda *arguments: probe.call("encode_kv_", *arguments)[1][2:12])
        held = (case.head_dim, *example.held())
        rows = (example.k[:, :, :LENGTH], example.v[:, :, :LENGTH])
        decoded = decode_exactly(stores, held), decode_exactly(example.stores, held)
        for x, got, plain in zip(rows, *decoded, strict=True):
            probe.compare_stored(got, plain, rotate_exactly(x))


def check_decode(probe: Probe, case: Case) -> None:
    example = Example(case)
    held = (case.head_dim, *example.held())
    exact = decode_exactly(example.stores, held)
    decode: Callable[..., Any] = reference.decode_kv
    for rotated in (True, False):
        plain = decode(*example.stores, *held, rotated=rotated)
        got, _ = probe.call("decode_kv", *example.stores, *held, rotated=rotated)
        for x, y, z in zip(got, plain, exact, strict=True):
            probe.compare(x, y, z if rotated else rotate_exactly(z, inverse=True))


def compare_attention(
    probe: Probe, got: tuple[Tensor, Tensor], q: Tensor, stores: list[Any], held: tuple[int, ...], **options: Any
) -> None:
    plain = reference.attend(q, *stores, *held, **options)
    rounding = ROUNDING
    if q.dtype != torch.float32:
        rounding = ROUNDING_OF_QUERIES.get(torch.device(probe.device).type, ROUNDING)
    for x, y, z in zip(got, plain, attend_exactly(q, stores, held, **options), strict=True):
        probe.compare(x, y, z, rounding)


def check_attend(probe: Probe, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    example = Example(case)
    for tokens in (1, 5):
        q = random(2, 4, tokens, case.head_dim, seed=2).to(dtype)
        got, _ = probe.call("attend", q, *example.stores, *example.held(), **options)
        compare_attention(probe, got, q, example.stores, example.held(), **options)


def check_decode_step(probe: Probe, case: Case) -> None:
    example = Example(case)
    q, token = random(2, 4, 1, case.head_dim, seed=2), (example.k[:, :, LENGTH:], example.v[:, :, LENGTH:])
    start, coded, _, *sizes = example.held()
    positions = (start, LENGTH, coded, example.coded(LENGTH + 1), *sizes)
    got, after = probe.call("decode_step_", q, *token, *example.stores, *positions)
    held = example.held(LENGTH + 1)
    stores, plain = after[3:13], list(example.stores)
    compare_attention(probe, got, q, stores, held)
    reference.encode_kv_(*token, *plain, *positions[1:])
    decoded = (decode_exactly(each, (case.head_dim, *held)) for each in (stores, plain))
    for x, y, z in zip((example.k, example.v), *decoded, strict=True):
        probe.compare_stored(y, z, rotate_exactly(x))


def general_checks() -> Iterator[Check]:
    for head_dim, dtype in product(sorted({case.head_dim for case in CASES}), DTYPES):
        yield Check(f"rotate D={head_dim} {type_name(dtype)}", partial(check_rotate, head_dim=head_dim, dtype=dtype))
    for case in dict.fromkeys(CASES):
        yield Check(f"encode_kv_ {case}", partial(check_encode, case=case))
        yield Check(f"decode_kv {case}", partial(check_decode, case=case))
        yield Check(f"attend {case}", partial(check_attend, case=case))
        yield Check(f"decode_step_ {case}", partial(check_decode_step, case=case))
    for dtype in DTYPES[1:]:
        yield Check(f"attend {FEATURES} {type_name(dtype)}", partial(check_attend, case=FEATURES, dtype=dtype))
    for name, options in attention_options().items():
        yield Check(f"attend {FEATURES} {name}", partial(check_attend, case=FEATURES, **options))


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention_options() -> dict[str, dict[str, Any]]:
    alone: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 3.0},
        "window": {"window": 150},
        "sinks": {"sinks": random(4, seed=4)},
        "mask": {"mask": random(2, 1, LENGTH, seed=3) > 0},
    }
    together = {key: value for options in alone.values() for key, value in options.items()}
    return {**alone, ", ".join(alone): together}


# Checks of the seed-shaped operators


@dataclass
class SeedExample:
    """Queries of 4 heads, and stores for 2 KV heads that the reference has filled on the CPU: a ring of SLOTS tokens.

    Bits are those of the codes; 16 are half-precision rows.
    """

    head_dim: int
    k_bits: int
    v_bits: int
    ring_start: int = 50

    def __post_init__(self) -> None:
        self.q = random(4, self.head_dim, seed=2)
        k, v = random(2, 2, SLOTS, self.head_dim)
        self.k, self.v = self.stored(k, self.k_bits), self.stored(v, self.v_bits)

    def stored(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        if bits == 16:
            return reference.rotate(x).half(), None
        packed, norms = empty_seed_store(self.head_dim, bits)
        quantise(reference_seed, x, packed, norms, bits)
        return packed, norms

    def exact(self, rotate_q: bool, options: dict[str, Any]) -> Tensor:
        """What attention gives, still rotated."""
        first = max(0, LENGTH - options["sliding_window"])
        slots = (torch.arange(first, LENGTH) + self.ring_start) % SLOTS
        k, v = (
            seed_rows(store, norms, bits, self.head_dim)[None, :, slots]
            for (store, norms), bits in ((self.k, self.k_bits), (self.v, self.v_bits))
        )
        q = rotate_exactly(self.q) if rotate_q else self.q.double()
        visible = torch.ones(1, 1, len(slots), dtype=torch.bool)
        scale, softcap = options["scale"], options["softcap"]
        return reference.softmax_attention(q[None, :, None], k, v, visible, scale, softcap, None)[0][0, :, 0]


def empty_seed_store(head_dim: int, bits: int) -> tuple[Tensor, Tensor]:
    packed = torch.zeros(2, SLOTS, head_dim // 2 if bits == 4 else head_dim, dtype=torch.uint8)
    return packed, torch.zeros((2, SLOTS) if head_dim == 256 else (2, SLOTS, 2))


def quantise(where: Any, x: Tensor, packed: Tensor, norms: Tensor, bits: int, position: int = 0) -> Any:
    """Call the quantiser for these bits, as an attribute of `where` or, if that is a probe, on its device."""
    name, width = ("hadamard_quantize_kv", ()) if bits == 4 else ("hadamard_quantize_kv_hb", (bits,))
    run = partial(where.call, name) if isinstance(where, Probe) else getattr(where, name)
    return run(x, packed, norms, position, *width, True)


def seed_rows(store: Tensor, norms: Tensor | None, bits: int, head_dim: int) -> Tensor:
    """The float64 rows, still rotated, that all slots of a seed-shaped store stand for."""
    wide = None if norms is None else norms.double()
    return reference_seed._seed_rows(store, wide, bits, head_dim, 1.0, torch.arange(SLOTS)).double()


def check_quantise(probe: Probe, head_dim: int, bits: int) -> None:
    x = random(2, SLOTS, head_dim)
    stores = [empty_seed_store(head_dim, bits) for _ in range(2)]
    _, after = quantise(probe, x, *stores[0], bits, position=70)  # around the ring
    quantise(reference_seed, x, *stores[1], bits, position=70)
    got, plain = seed_rows(after[1], after[2], bits, head_dim), seed_rows(*stores[1], bits, head_dim)
    probe.compare_stored(got, plain, rotate_exactly(x).roll(70, 1))


def check_seed_attention(probe: Probe, name: str, head_dim: int, k_bits: int, v_bits: int) -> None:
    example = SeedExample(head_dim, k_bits, v_bits)
    (k, k_norms), (v, v_norms) = example.k, example.v
    stores = (k, v, v_norms) if k_bits == 16 else (k, k_norms, v, v_norms)
    options = {"scale": head_dim**-0.5, "mask_type": 2, "sliding_window": 400, "softcap": 5.0}
    options["ring_start"] = example.ring_start
    rotate_q = name != "flash_attn_vec_tq"
    if rotate_q:
        options |= {"codebook_bits": 8 if v_bits == 16 else v_bits, "fuse_fwht_pre": True}
    got, _ = probe.call(name, example.q, *stores, LENGTH, **options)
    exact = example.exact(rotate_q, options)
    if name.endswith("undo"):
        exact = rotate_exactly(exact, inverse=True)
    probe.compare(got, getattr(reference_seed, name)(example.q, *stores, LENGTH, **options), exact)


def check_reduce(probe: Probe, name: str, head_dim: int) -> None:
    rows, parts = 4, 16
    sums = torch.stack([1 + random(rows, parts).square(), 3 * random(rows, parts, seed=1)], -1)
    tmp = torch.cat([random(rows * parts * head_dim, seed=2), sums.flatten()])
    got, _ = probe.call(name, tmp, rows, head_dim, parts)
    exact = reference_seed.flash_attn_vec_reduce(tmp.double(), rows, head_dim, parts)
    if name.endswith("undo"):
        exact = rotate_exactly(exact, inverse=True)
    probe.compare(got, getattr(reference_seed, name)(tmp, rows, head_dim, parts), exact)


def check_fwht(probe: Probe, name: str, head_dim: int) -> None:
    x = random(5, head_dim)
    got, _ = probe.call(name, x)
    exact = rotate_exactly(x, inverse=name.endswith("undo"))
    probe.compare(got, getattr(reference_seed, name)(x), exact)


def seed_attentions() -> Iterator[tuple[str, int, int]]:
    """Operator, bits of keys and bits of values."""
    yield "flash_attn_vec_tq", 4, 4
    for name in ("flash_attn_vec_tq_hb", "flash_attn_vec_tq_hb_with_fused_undo"):
        yield from ((name, bits, bits) for bits in SEED_BITS if bits > 4)
    yield from (("flash_attn_vec_hybrid", 16, bits) for bits in (*SEED_BITS, 16) if bits > 4)


def seed_checks() -> Iterator[Check]:
    for head_dim in SEED_HEAD_DIMS:
        for name in ("fwht_sign_premult", "fwht_sign_undo"):
            yield Check(f"{name} D={head_dim}", partial(check_fwht, name=name, head_dim=head_dim))
        for bits in SEED_BITS:
            name = "hadamard_quantize_kv" + ("_hb" if bits > 4 else "")
            yield Check(f"{name} D={head_dim} {bits} bits", partial(check_quantise, head_dim=head_dim, bits=bits))
        for name, k_bits, v_bits in seed_attentions():
            run = partial(check_seed_attention, name=name, head_dim=head_dim, k_bits=k_bits, v_bits=v_bits)
            yield Check(f"{name} D={head_dim} {k_bits}/{v_bits}", run)
        for name in ("flash_attn_vec_reduce", "flash_attn_vec_reduce_tq_hb_undo"):
            yield Check(f"{name} D={head_dim}", partial(check_reduce, name=name, head_dim=head_dim))


# The report


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


def checks() -> list[Check]:
    return [*general_checks(), *seed_checks()]


def examine(check: Check, device: str) -> bool:
    """Run one check and print its line; whether it is well."""
    # The name first: should the process not survive, it is what the report ends with.
    print(f"  {check.name:<72}", end="", flush=True)
    probe, complaint = Probe(device), ""
    try:
        check.run(probe)
        error, bound = probe.worst()
    except Exception as raised:
        complaint = f"{type(raised).__name__}: {raised}"
    duration = "" if probe.seconds is None else f"{1000 * probe.seconds:.1f} ms"
    if complaint:
        print(f"{duration:>12}  FAILED", *complaint.splitlines(), sep="\n    ", flush=True)
        return False
    is_well = error <= bound  # and no NaN
    print(f"{duration:>12} {error:10.2e} {bound:10.2e}  {'ok' if is_well else 'FAILED'}", flush=True)
    return is_well


def examine_device(device: str, wanted: Iterable[Check]) -> int:
    """How many of these checks failed on the device; printed as they end."""
    print(f"\n{device + ':':<74}{'first call':>12} {'error':>10} {'bound':>10}")
    with torch.no_grad():
        return [examine(check, device) for check in wanted].count(False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description = __doc__
    parser.epilog = (
        "An error is relative to the same computation in float64, and may be twice that of plain float32 PyTorch. Of "
        "rows that are stored it says by how much what storing loses differs from what the reference loses. The time "
        "is that of the first call, which on a GPU compiles shaders."
    )
    parser.add_argument(
        "--device", nargs="+", choices=DEVICES, help="check these; FAILED if one is not here (all here)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the report; exit code 1 if a check failed or a device that was asked for is not here."""
    for name, text in description():
        print(f"{name + ':':<14}{text}", flush=True)
    failed = count = 0
    for device in arguments.device or [device for device in DEVICES if is_here(device)]:
        if not is_here(device):
            print(f"\n{device}: FAILED: there is no such device")
            failed, count = failed + 1, count + 1
            continue
        wanted = checks()
        failed, count = failed + examine_device(device, wanted), count + len(wanted)
    print(f"\n{failed} of {count} checks FAILED" if failed else f"\nall {count} checks passed")
    if failed:
        raise SystemExit(1)
