"""What the seed-shaped operators refuse: one table of changes to a valid call, on every device and on meta tensors."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

Args = dict[str, Any]

HEADS, KV_HEADS, LENGTH, CAPACITY, NWG = 4, 2, 8, 10, 2
HEAD_DIMS = (256, 512)
LARGEST = 2**63 - 1

TQ = ("flash_attn_vec_tq",)
CODED = (*TQ, "flash_attn_vec_tq_hb", "flash_attn_vec_tq_hb_with_fused_undo")
HYBRID = ("flash_attn_vec_hybrid",)
ATTENTION = (*CODED, *HYBRID)
HIGHER = ATTENTION[1:]
QUANTISE = ("hadamard_quantize_kv", "hadamard_quantize_kv_hb")
ROTATE = ("fwht_sign_premult", "fwht_sign_undo")
REDUCE = ("flash_attn_vec_reduce", "flash_attn_vec_reduce_tq_hb_undo")


def valid_args(op: str, device: str, head_dim: int) -> Args:
    """A call that is accepted, with buffers that show when they are written to."""
    four_bits = op in ("flash_attn_vec_tq", "hadamard_quantize_kv")
    groups = () if head_dim == 256 else (2,)

    def store() -> Tensor:
        row = head_dim // 2 if four_bits else head_dim
        return torch.full((KV_HEADS, CAPACITY, row), 3, dtype=torch.uint8, device=device)

    def norms() -> Tensor:
        return torch.full((KV_HEADS, CAPACITY, *groups), 2.0, device=device)

    def tmp() -> Tensor:
        return torch.full((HEADS * NWG * (head_dim + 2),), 7.0, device=device)

    if op in ROTATE:
        return {"x": torch.randn(3, head_dim, device=device)}
    if op in REDUCE:
        return {"tmp": tmp(), "nrows": HEADS, "head_dim": head_dim, "nwg": NWG}
    if op in QUANTISE:
        bits = {} if four_bits else {"codebook_bits": 6}
        x = torch.randn(KV_HEADS, 2, head_dim, device=device)
        return {"x": x, "packed": store(), "norms": norms(), "write_pos": CAPACITY - 2, **bits}
    keys = {"k_packed": store(), "k_norms": norms()}
    if op in HYBRID:
        keys = {"k_f16": torch.ones(KV_HEADS, CAPACITY, head_dim, dtype=torch.float16, device=device)}
    return {
        "q": torch.randn(HEADS, head_dim, device=device),
        **keys,
        "v_packed": store(),
        "v_norms": norms(),
        "kv_seq_len": LENGTH,
        "scale": 0.1,
        **({} if four_bits else {"codebook_bits": 6, "nsg": 1}),
        "nwg": NWG,
        "tmp": tmp(),
    }


# Changes to an argument


def resized(dim: int, size: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] = size
        return x.new_ones(shape)

    return change


def other_row(x: Tensor) -> Tensor:
    return resized(-1, x.shape[-1] // 2 if x.shape[-1] == 256 else x.shape[-1] * 2)(x)


def other_norms(norms: Tensor) -> Tensor:
    """The layout of the other head_dim."""
    return norms.new_ones(*norms.shape[:2], *(() if norms.dim() == 3 else (2,)))


def strided(x: Tensor) -> Tensor:
    return x.new_ones(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


def elsewhere(x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=x.dtype, device="cpu" if x.is_meta else "meta")


def smaller(x: Tensor) -> Tensor:
    return x[:-1].clone()


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(torch.int64 if x.is_mps and dtype == torch.float64 else dtype)  # mps has no float64


@dataclass(frozen=True)
class Case:
    name: str
    ops: tuple[str, ...]
    changes: dict[str, Any]  # argument: its new value, or what makes it of the valid one
    message: str


def cases() -> Iterator[Case]:
    yield Case("head_dim 128", ATTENTION, {"q": resized(-1, 128)}, "head_dim must be 256 or 512, got 128")
    yield Case("head_dim 128", (*QUANTISE, *ROTATE), {"x": resized(-1, 128)}, "head_dim must be 256 or 512, got 128")
    yield Case("head_dim 128", REDUCE, {"head_dim": 128}, "head_dim must be 256 or 512, got 128")

    # Shapes of a call
    yield Case("no heads", ATTENTION, {"q": resized(0, 0)}, "num_heads and num_kv_heads must be > 0, got 0 and 2")
    no_kv_heads = {name: resized(0, 0) for name in ("v_packed", "v_norms")}
    no_coded_heads = {**no_kv_heads, "k_packed": resized(0, 0), "k_norms": resized(0, 0)}
    yield Case("no kv heads", CODED, no_coded_heads, "num_heads and num_kv_heads must be > 0, got 4 and 0")
    no_half_heads = {**no_kv_heads, "k_f16": resized(0, 0)}
    yield Case("no kv heads", HYBRID, no_half_heads, "num_heads and num_kv_heads must be > 0, got 4 and 0")
    yield Case("heads", ATTENTION, {"q": resized(0, 3)}, "num_heads (3) must be divisible by num_kv_heads (2)")
    yield Case("q of two tokens", ATTENTION, {"q": lambda q: q[:, None].repeat(1, 2, 1)}, "q must be [heads, head_dim]")
    yield Case("q of one head", ATTENTION, {"q": lambda q: q[0].clone()}, "q must be [heads, head_dim]")
    yield Case("empty", ATTENTION, {"kv_seq_len": 0}, "kv_seq_len must be > 0, got 0")
    yield Case("negative length", ATTENTION, {"kv_seq_len": -3}, "kv_seq_len must be > 0, got -3")
    yield Case("capacity", ATTENTION, {"kv_seq_len": 11}, "kv_capacity (10) must be >= kv_seq_len (11)")
    yield Case("huge length", ATTENTION, {"kv_seq_len": LARGEST}, "kv_capacity (10) must be >= kv_seq_len")

    # Numbers
    for bits in (0, 2, 4, 7, 16):
        message = f"codebook_bits must be 5, 6, or 8, got {bits}"
        yield Case(f"{bits} bits", (*HIGHER, QUANTISE[1]), {"codebook_bits": bits}, message)
    for nsg in (-1, 3, 5, 8):
        yield Case(
            f"nsg {nsg}",
            HIGHER,
            {"nsg": nsg},
            f"nsg must be a power of 2 and at most 4, or 0 for the launch policy, got {nsg}",
        )
    for nwg in (-1, 33):
        yield Case(f"nwg {nwg}", ATTENTION, {"nwg": nwg}, f"nwg must be 1 to 32, or 0 for the launch policy, got {nwg}")
    for nwg in (-1, 0, 33):
        yield Case(f"nwg {nwg}", REDUCE, {"nwg": nwg}, f"nwg must be > 0 and at most 32, got {nwg}")
    for mask_type in (-1, 3):
        yield Case(f"mask_type {mask_type}", ATTENTION, {"mask_type": mask_type}, "mask_type must be 0")
    yield Case("negative window", ATTENTION, {"sliding_window": -1}, "sliding_window must not be negative, got -1")
    yield Case("negative ring_start", ATTENTION, {"ring_start": -1}, "ring_start must be a slot, 0 to 9, got -1")
    yield Case("ring_start", ATTENTION, {"ring_start": CAPACITY}, "ring_start must be a slot, 0 to 9, got 10")
    for value in (math.nan, math.inf, -1.0):
        yield Case(f"softcap {value}", ATTENTION, {"softcap": value}, "softcap must be 0 (none) or a positive number")
        message = "scale_factor_d512 must be a finite number"
        yield Case(f"scale factor {value}", (*ATTENTION, *QUANTISE), {"scale_factor_d512": value}, message)
    for value in (math.nan, math.inf, -math.inf):
        yield Case(f"scale {value}", ATTENTION, {"scale": value}, "scale must be finite")
    yield Case("negative rows", REDUCE, {"nrows": -1}, "nrows must not be negative, got -1")
    yield Case("negative write_pos", QUANTISE, {"write_pos": -1}, "write_pos must be 0 to 2^31 - 1, got -1")
    yield Case("write_pos", QUANTISE, {"write_pos": CAPACITY - 1}, "9 and 2 tokens do not fit a capacity of 10")
    # The end of the positions, and the numbers that partial results take, are larger than any integer here.
    yield Case("write_pos overflows", QUANTISE, {"write_pos": LARGEST}, "write_pos")
    yield Case("ring write_pos overflows", QUANTISE, {"write_pos": LARGEST, "is_sliding": True}, "write_pos")
    yield Case("rows overflow", REDUCE, {"nrows": 2**62, "nwg": 4}, "tmp must hold")
    no_slots = {"packed": resized(1, 0), "norms": resized(1, 0), "is_sliding": True}
    yield Case("ring without slots", QUANTISE, no_slots, "do not fit a capacity of 0")

    # Stores: every tensor of every operator
    tensors = [
        ("q", ATTENTION, "float32"),
        ("k_packed", CODED, "uint8"),
        ("k_norms", CODED, "float32"),
        ("k_f16", HYBRID, "float16"),
        ("v_packed", ATTENTION, "uint8"),
        ("v_norms", ATTENTION, "float32"),
        ("tmp", (*ATTENTION, *REDUCE), "float32"),
        ("x", (*QUANTISE, *ROTATE), "float32"),
        ("packed", QUANTISE, "uint8"),
        ("norms", QUANTISE, "float32"),
    ]
    wrong = {"float32": (torch.float64, torch.float16), "float16": (torch.float32, torch.bfloat16, torch.uint8)}
    for name, ops, type_name in tensors:
        for dtype in wrong.get(type_name, (torch.int8, torch.float32)):
            yield Case(f"{name} {dtype}", ops, {name: to(dtype)}, f"{name} must be ")
        if name not in ("q", "x"):  # those are read wherever they lie, and the others must be with them
            yield Case(f"{name} strided", ops, {name: strided}, f"{name} must be contiguous")
            if ops[-1] not in REDUCE:
                yield Case(f"{name} elsewhere", ops, {name: elsewhere}, f"{name} is on ")
    yield Case("tmp elsewhere", ATTENTION, {"tmp": elsewhere}, "tmp is on ")
    for name, ops in (("k_packed", CODED), ("k_f16", HYBRID), ("v_packed", ATTENTION), ("packed", QUANTISE)):
        yield Case(f"{name} row", ops, {name: other_row}, f"{name} must be [kv_heads, capacity, row]")
        yield Case(f"{name} of one head", ops, {name: lambda x: x[0].clone()}, "must be [kv_heads, capacity, row]")
    for name, ops in (("v_packed", ATTENTION), ("packed", QUANTISE)):
        yield Case(f"{name} heads", ops, {name: resized(0, 3)}, f"{name} must be [kv_heads, capacity, row]")
    yield Case(
        "v_packed capacity", ATTENTION, {"v_packed": resized(1, 9)}, "v_packed must be [kv_heads, capacity, row]"
    )
    for name, ops in (("k_norms", CODED), ("v_norms", ATTENTION), ("norms", QUANTISE)):
        yield Case(f"{name} layout", ops, {name: other_norms}, f"{name} must be [kv_heads, capacity")
        yield Case(f"{name} capacity", ops, {name: resized(1, 9)}, f"{name} must be [kv_heads, capacity")
    yield Case("v_norms missing", HYBRID, {"v_norms": None}, "v_norms are missing")
    yield Case("tmp", (*ATTENTION, *REDUCE), {"tmp": smaller}, "tmp must hold")
    yield Case("tmp of the policy", ATTENTION, {"nwg": 0}, "tmp must hold num_heads * nwg * (head_dim + 2) = ")
    yield Case("x of four dimensions", QUANTISE, {"x": lambda x: x[None]}, "x must be [kv_heads, head_dim] or")
    yield Case("x of one dimension", QUANTISE, {"x": lambda x: x[0, 0].clone()}, "x must be [kv_heads, head_dim] or")
    yield Case("x a scalar", ROTATE, {"x": lambda x: x[0, 0].clone()}, "x must have at least one dimension")


def changed(valid: Args, changes: dict[str, Any]) -> Args:
    made = {name: change(valid[name]) if callable(change) else change for name, change in changes.items()}
    return {**valid, **made}


def check_refusal(op: str, args: Args, message: str) -> None:
    """A ValueError that names the operator, and no buffer is touched."""
    tensors = [x for x in args.values() if isinstance(x, Tensor) and not x.is_meta]
    kept = [x.clone() for x in tensors]
    with pytest.raises(ValueError, match=rf"^{op}: .*{re.escape(message)}"):
        getattr(torch.ops.tqattn, op)(**args)
    assert all(torch.equal(x, y) for x, y in zip(tensors, kept, strict=True))


TABLE = [(op, case) for case in cases() for op in case.ops]
every_refusal = pytest.mark.parametrize(("op", "case"), [pytest.param(o, c, id=f"{c.name}-{o}") for o, c in TABLE])
every_op = pytest.mark.parametrize("op", [*ATTENTION, *QUANTISE, *ROTATE, *REDUCE])
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


@every_refusal
@every_head_dim
def test_refused(device: str, op: str, case: Case, head_dim: int) -> None:
    check_refusal(op, changed(valid_args(op, device, head_dim), case.changes), case.message)


@every_refusal
def test_refused_on_meta_tensors(op: str, case: Case) -> None:
    check_refusal(op, changed(valid_args(op, "meta", 512), case.changes), case.message)


@every_op
@every_head_dim
def test_the_call_that_the_cases_change_is_accepted(device: str, op: str, head_dim: int) -> None:
    """So that each case is refused for its change alone; and a meta call gives shapes, types and devices as it does."""
    out = getattr(torch.ops.tqattn, op)(**valid_args(op, device, head_dim))
    fake = getattr(torch.ops.tqattn, op)(**valid_args(op, "meta", head_dim))
    if op in QUANTISE:
        assert out is None
        assert fake is None
        return
    assert (out.shape, out.dtype, out.stride()) == (fake.shape, fake.dtype, fake.stride())
    assert out.device.type == device
    assert fake.is_meta


LIMITS: list[tuple[tuple[str, ...], Args]] = [
    (ATTENTION, {"kv_seq_len": CAPACITY, "ring_start": CAPACITY - 1}),
    (ATTENTION, {"kv_seq_len": 1, "mask_type": 2, "sliding_window": LARGEST}),
    (ATTENTION, {"nwg": 32, "tmp": None, "mask_type": 1, "scale": 0.0, "scale_factor_d512": 0.0}),
    (ATTENTION, {"nwg": 1}),
    (HIGHER, {"nsg": 0, "codebook_bits": 5}),
    (HIGHER, {"nsg": 4, "codebook_bits": 8}),
    (HYBRID, {"v_packed": lambda v: resized(-1, v.shape[-1])(v.half()), "v_norms": None}),
    (QUANTISE, {"write_pos": 0, "scale_factor_d512": 0.0}),
    (QUANTISE, {"write_pos": 10**6, "is_sliding": True}),
    (REDUCE, {"nrows": 0}),
    (REDUCE, {"nrows": 1, "nwg": NWG * HEADS}),
]


@pytest.mark.parametrize("place", ["device", "meta"])
@pytest.mark.parametrize("limit", range(len(LIMITS)))
@every_head_dim
def test_values_at_the_limits_are_accepted(device: str, place: str, limit: int, head_dim: int) -> None:
    ops, changes = LIMITS[limit]
    for op in ops:
        out = getattr(torch.ops.tqattn, op)(
            **changed(valid_args(op, device if place == "device" else "meta", head_dim), changes)
        )
        assert out is None or out.is_meta or out.isfinite().all()
