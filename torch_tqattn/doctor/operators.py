"""The doctor's checks of the general operators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from .. import format as fmt
from .. import reference
from .probe import ROUNDING, Check, Probe, random, rotate_exactly

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE, SINK_LENGTH = 32, 4
LENGTH = 607  # positions in a store: enough for several simdgroups, and one token short of a whole block
FIRST = 400  # of them, stored by the first of two calls
SLOTS, TAIL_SLOTS = 640, 40
# By how much queries of 16 bits, once they are rotated, and their weights are rounded on top of that: to half precision
# on CUDA; on the CPU, with AVX-512, to steps of 2^-15 of the largest.
ROUNDING_OF_QUERIES = {"cuda": 2.0**-11, "cpu": 2.0**-16}


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


def decode_exactly(stores: list[Any], held: tuple[int, ...], starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotated rows of K and V: levels, which are float32 numbers, times norms, plus means."""
    wide = [x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in stores]
    decode: Callable[..., Any] = reference.decode_kv
    k, v = decode(*wide, *held, starts=starts, rotated=True)
    return k.double(), v.double()


def attend_exactly(
    q: Tensor,
    stores: list[Any],
    held: tuple[int, ...],
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    k, v = decode_exactly(stores, (q.shape[-1], *held), starts)
    start, _, length = held[:3]
    position = torch.arange(start, length)
    ends = torch.tensor([length]) if lengths is None else lengths
    query = ends[:, None, None] - q.shape[2] + torch.arange(q.shape[2])[:, None]
    visible = position <= query if causal else (position < ends[:, None, None]).expand(-1, q.shape[2], -1)
    if starts is not None:
        visible = visible & (position >= starts[:, None, None])
    if window:
        visible = visible & (position > query - window)
    if mask is not None:
        visible = visible & mask
    scale = q.shape[-1] ** -0.5
    out, lse = reference.softmax_attention(rotate_exactly(q), k, v, visible, scale, softcap, sinks)
    return rotate_exactly(out, inverse=True), lse


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
    starts: Tensor | None = None  # of each sequence: its first position that is no padding

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
            positions = (begin, self.coded(begin), self.coded(end), case.block_size, self.sink_length, self.starts)
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
    example = Example(case, starts=options.get("starts"))
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


def checks() -> Iterator[Check]:
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
        "starts": {"starts": torch.tensor([37, 0], dtype=torch.int32)},
        "lengths": {"lengths": torch.tensor([LENGTH, 450], dtype=torch.int32)},
        "not causal": {"causal": False},
    }
    together = {key: value for options in alone.values() for key, value in options.items() if key != "causal"}
    return {**alone, "all of them, causal": together}
