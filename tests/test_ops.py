"""The general operators: rotate, encode_kv_, attend, decode_kv, decode_step_."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import exact_attention, float32_bound, relative_error
from stores import clone, empty_stores
from torch import Tensor

from torch_tqattn import format as fmt
from torch_tqattn import ops, reference

tqattn = torch.ops.tqattn
CODED = [name for name, storage in fmt.FORMATS.items() if storage.is_coded]
FORMAT_PAIRS = [
    ("tq4", "tq4"),
    ("tq8", "tq4"),
    ("tq2", "tq3"),
    ("tq5", "tq6"),
    ("f16", "tq8"),
    ("tq6-byte", "tq5-byte"),
]


def filled(
    k_format: str,
    v_format: str,
    head_dim: int,
    length: int,
    device: str,
    *,
    block_size: int = 0,
    starts: Tensor | None = None,
    **sizes: int,
) -> tuple[list[Any], int]:
    """Stores holding `length` random tokens, and how many of them are coded."""
    tail_slots = block_size + 8 if block_size else 0
    slots = sizes.pop("slots", -(-length // max(block_size, 1)) * max(block_size, 1) or 1)
    stores = empty_stores(
        k_format, v_format, head_dim, slots=slots, block_size=block_size, tail_slots=tail_slots, device=device, **sizes
    )
    k, v = torch.randn(2, *stores[0].shape[:2], length, head_dim, device=device)
    coded = length // block_size * block_size if block_size else length
    tqattn.encode_kv_(k, v, *stores, 0, 0, coded, block_size, sizes.get("sink_length", 0), starts)
    return stores, coded


# Rotation


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotation_is_the_signed_hadamard_transform(head_dim: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, head_dim, device=device).to(dtype)
    matrix = fmt.signs(head_dim).double()[:, None] * fmt.hadamard(head_dim) / math.sqrt(head_dim)
    plain = x.cpu().float() @ matrix.float()
    expected = x.cpu().double() @ matrix
    rotated = tqattn.rotate(x)
    assert rotated.dtype == torch.float32
    # A butterfly adds log2(D) numbers where a matrix product adds D: no worse than twice the product's error.
    assert relative_error(rotated, expected) <= 2 * max(relative_error(plain, expected), 2**-24)
    assert relative_error(tqattn.rotate(rotated, True), x) < 1e-6


def test_rotation_of_nothing_and_of_strided_input(device: str) -> None:
    assert tqattn.rotate(torch.empty(0, 64, device=device)).shape == (0, 64)
    x = torch.randn(64, 7, device=device)
    assert torch.equal(tqattn.rotate(x.T), tqattn.rotate(x.T.contiguous()))


# Encoding and decoding


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize(("k_format", "v_format"), FORMAT_PAIRS)
@pytest.mark.parametrize(("encode", "sink_length"), [("fast", 0), ("best", 5), ("plain", 40)])
def test_encode_agrees_with_the_reference(
    head_dim: int, block_size: int, k_format: str, v_format: str, encode: str, sink_length: int, device: str
) -> None:
    sizes = {"slots": 48, "block_size": block_size, "tail_slots": 24 if block_size else 0, "sink_length": sink_length}
    stores = empty_stores(k_format, v_format, head_dim, **sizes, device=device)
    starts = torch.tensor([0, 7], dtype=torch.int32, device=device) if sink_length else None
    expected = clone(stores)
    k, v = torch.randn(2, 2, 2, 75, head_dim, device=device)
    position = coded = 0
    for tokens in (40, 1, 1, 33):  # past the 48 slots: a ring
        end = position + tokens
        coded_end = max(coded, (end - 3) // block_size * block_size) if block_size else end
        arguments = (position, coded, coded_end, block_size, sink_length, starts, encode)
        tqattn.encode_kv_(k[:, :, position:end], v[:, :, position:end], *stores, *arguments)
        reference.encode_kv_(k[:, :, position:end], v[:, :, position:end], *expected, *arguments)
        position, coded = end, coded_end
    start = 75 - 40
    held = (head_dim, start, coded, 75, block_size, sink_length, starts)
    got = tqattn.decode_kv(*stores, *held, rotated=True)
    wanted = reference.decode_kv(*expected, *held, rotated=True)
    for x, y, name in zip(got, wanted, (k_format, v_format), strict=True):
        assert x.shape == (2, 2, 40, head_dim)
        # The last bit of float32 decides now and then how a number rounds to half, or to which side of a threshold.
        is_apart = (x - y).norm(dim=-1) > 2**-10 * y.norm(dim=-1)
        assert is_apart.float().mean() < 0.03, name
    for rotated in (False, True):  # the same bytes decode to the same numbers
        got = tqattn.decode_kv(*expected, *held, rotated=rotated)
        for x, y in zip(got, reference.decode_kv(*expected, *held, rotated=rotated), strict=True):
            assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("name", CODED)
def test_codes_are_the_nearest_levels(name: str, device: str) -> None:
    storage = fmt.FORMATS[name]
    stores = empty_stores(name, name, 128, slots=32, device=device)
    x = torch.randn(2, 2, 32, 128, device=device)
    tqattn.encode_kv_(x, x, *stores, 0, 0, 32, encode="plain")
    rotated = reference.rotate(x).cpu().double()
    normalised = rotated / rotated.square().mean(-1, keepdim=True).sqrt()
    levels = fmt.levels(storage.bits).double()
    chosen = levels[fmt.unpack(stores[0].cpu(), storage, 128).int()]
    nearest = (normalised[..., None] - levels).abs().amin(-1)
    assert ((normalised - chosen).abs() <= nearest + 1e-5).all()
    assert torch.equal(stores[0], stores[4])
    assert relative_error(stores[1], rotated.square().mean(-1).sqrt()) < 1e-6


@pytest.mark.parametrize("padding", [None, [0, 13], [90, 3]], ids=str)
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("sink_length", [1, 5, 21])
def test_the_first_tokens_of_each_sequence_stay_dense(
    sink_length: int, block_size: int, padding: list[int] | None, device: str
) -> None:
    sizes = {"slots": 64, "block_size": block_size, "tail_slots": 24 if block_size else 0, "device": device}
    stores = empty_stores("tq4", "f16", 64, sink_length=sink_length, **sizes)
    without = empty_stores("tq4", "f16", 64, **sizes)
    k, v = torch.randn(2, 2, 2, 60, 64, device=device)
    starts = None if padding is None else torch.tensor(padding, dtype=torch.int32, device=device)
    position = coded = 0
    for tokens in (3, 1, 30, 26):
        end = position + tokens
        coded_end = end // block_size * block_size if block_size else end
        part = (k[:, :, position:end], v[:, :, position:end])
        tqattn.encode_kv_(*part, *stores, position, coded, coded_end, block_size, sink_length, starts)
        tqattn.encode_kv_(*part, *without, position, coded, coded_end, block_size, 0, starts)
        position, coded = end, coded_end
    held = (64, 0, coded, 60, block_size)
    decoded = tqattn.decode_kv(*stores, *held, sink_length, starts, rotated=True)
    plain = tqattn.decode_kv(*without, *held, 0, starts, rotated=True)
    matrix = fmt.signs(64).double()[:, None] * fmt.hadamard(64) / 8
    for x, y, original in zip(decoded, plain, (k, v), strict=True):
        for b in range(2):
            first = 0 if padding is None else padding[b]
            sinks = slice(first, first + sink_length)
            exact = original[b, :, sinks].cpu().double() @ matrix
            # Half's rounding, and float32's of the rotation's six steps.
            limit = 2**-11 * exact.abs() + 2**-24 * 6 * exact.norm(dim=-1, keepdim=True)
            assert ((x[b, :, sinks].cpu() - exact).abs() <= limit).all()
            if not block_size:  # no mean knows of them either
                assert torch.equal(x[b, :, sinks.stop :], y[b, :, sinks.stop :])
            assert (x[b, :, : sinks.start] == 0).all()
    # Elsewhere they leave what padding does: zeros, which are in no mean.
    padded = empty_stores("tq4", "f16", 64, **sizes)
    ends = torch.tensor(padding or [0, 0], dtype=torch.int32, device=device) + sink_length
    tqattn.encode_kv_(k, v, *padded, 0, 0, coded, block_size, 0, ends)
    waiting = torch.arange(coded, 60, device=device) % 24
    for i, (x, y) in enumerate(zip(stores[:8], padded[:8], strict=True)):
        if i in (3, 7) and block_size:
            assert torch.equal(x[:, :, sink_length + waiting], y[:, :, waiting])
        elif i not in (3, 7) and x is not None:
            assert torch.equal(x, y)


def best_errors(x: Tensor, bits: int) -> Tensor:
    """From the definition, in float64: each row's least squared error, over its squared length, among all scales."""
    levels = fmt.levels(bits).double()
    y = reference.rotate(x).cpu().double()
    y = y.unflatten(-1, (-1, min(x.shape[-1], fmt.NORM_GROUP)))
    length = y.norm(dim=-1, keepdim=True)
    tried = []
    for multiplier in torch.linspace(0.8, 1.2, 9, dtype=torch.float64):
        scale = length / math.sqrt(y.shape[-1]) * multiplier
        codes = levels[(y[..., None] / scale[..., None] - levels).abs().argmin(-1)]
        tried.append((y - codes * length / codes.norm(dim=-1, keepdim=True)).square().sum(-1))
    return torch.stack(tried).amin(0).sum(-1) / y.square().sum((-1, -2))


def coded_errors(x: Tensor, name: str, encode: str) -> Tensor:
    """Each row's squared error, over its squared length, in the rotated domain."""
    stores = empty_stores(name, name, x.shape[-1], batch=x.shape[0], heads=x.shape[1], slots=x.shape[2])
    stores = [s.to(x.device) if isinstance(s, Tensor) else s for s in stores]
    tqattn.encode_kv_(x, x, *stores, 0, 0, x.shape[2], encode=encode)
    decoded = tqattn.decode_kv(*stores, x.shape[-1], 0, x.shape[2], x.shape[2], rotated=True)[0].cpu().double()
    y = tqattn.rotate(x).cpu().double()
    return (decoded - y).square().sum(-1) / y.square().sum(-1)


def best_slack(errors: Tensor, head_dim: int) -> Tensor:
    """How much more than the least error the chosen one may be: float32 rounds both that are compared.

    Each is off by the rounding of its sum, and by that of numbers of the row's size.
    """
    return 2 * 2**-24 * (head_dim + 8 / errors.sqrt()) * errors


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
@pytest.mark.parametrize("name", CODED)
def test_best_codes_make_the_smallest_angle(name: str, head_dim: int, device: str) -> None:
    x = torch.randn(2, 2, 20, head_dim, device=device)
    errors, least = coded_errors(x, name, "best"), best_errors(x, fmt.FORMATS[name].bits)
    assert (errors <= least + best_slack(least, head_dim)).all()


@given(
    head_dim=st.sampled_from(fmt.HEAD_DIMS),
    name=st.sampled_from(CODED),
    power=st.sampled_from([0.3, 1.0, 3.0, 9.0]),
    size=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 2**16),
)
def test_best_is_never_worse_than_fast(head_dim: int, name: str, power: float, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        # Rotated, the numbers are as flat or as peaked as `power` makes them.
        y = torch.randn(1, 1, 20, head_dim)
        x = tqattn.rotate(y.sign() * y.abs() ** power, True) * size
        fast, best = coded_errors(x, name, "fast"), coded_errors(x, name, "best")
        assert (best <= fast + best_slack(fast, head_dim)).all()


@pytest.mark.parametrize("name", CODED)
def test_best_codes_special_rows_as_fast_does(name: str, device: str) -> None:
    x = torch.randn(2, 2, 8, 64, device=device)
    x[:, :, 1], x[:, :, 3, 5], x[:, :, 6, 7] = 0, math.nan, math.inf
    stores = [empty_stores(name, name, 64, slots=8, device=device) for _ in range(2)]
    for encode, store in zip(("fast", "best"), stores, strict=True):
        tqattn.encode_kv_(x, x, *store, 0, 0, 8, encode=encode)
    codes, norms = ([store[i][:, :, [1, 3, 6]] for store in stores] for i in (0, 1))
    assert torch.equal(codes[0][:, :, 0], codes[1][:, :, 0])
    assert torch.equal(norms[0].isnan(), norms[1].isnan())
    assert (norms[1][:, :, 0] == 0).all()
    assert norms[1][:, :, 1:].isnan().all()


# Attention


def check_attend(
    q: Tensor,
    stores: list[Any],
    start: int,
    coded: int,
    length: int,
    block_size: int,
    sink_length: int = 0,
    starts: Tensor | None = None,
    **options: Any,
) -> None:
    held = (start, coded, length, block_size, sink_length)
    k, v = tqattn.decode_kv(*stores, q.shape[-1], *held, starts)
    before, query = clone(stores), q.clone()
    out, lse = tqattn.attend(q, *stores, *held, starts=starts, **options)
    for a, b in zip(stores, before, strict=True):  # nothing is written to
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q, query)
    window = options.pop("window", 0)
    if starts is not None:
        seen = torch.arange(start, length, device=q.device) >= starts[:, None, None]
        options["mask"] = seen & options.get("mask", seen)
    expected, expected_lse = exact_attention(q, k, v, window=window or None, **options)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    assert relative_error(out, expected) < float32_bound(length)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.cpu().isneginf(), expected_lse.isneginf())
    assert (lse.cpu().double() - expected_lse)[seen].abs().max().item() < 2e-5 if seen.any() else True


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize(("k_format", "v_format"), FORMAT_PAIRS)
def test_attend(head_dim: int, block_size: int, k_format: str, v_format: str, device: str) -> None:
    stores, coded = filled(k_format, v_format, head_dim, 75, device, block_size=block_size)
    for heads, tokens in ((2, 1), (6, 1), (6, 5), (2, 40)):
        q = torch.randn(2, heads, tokens, head_dim, device=device)
        check_attend(q, stores, 0, coded, 75, block_size)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"window": 20},
        {"window": 1},
        {"scale": 0.02},
        {"scale": 0.0},
        {"sinks": True},
        {"mask": (1, 1)},
        {"mask": (2, 5)},
        {"causal": False},
        {"softcap": 2.0, "window": 33, "sinks": True, "mask": (2, 5), "scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [0, 16])
def test_attend_options(options: dict[str, Any], block_size: int, device: str) -> None:
    stores, coded = filled("tq4", "tq8", 128, 300, device, block_size=block_size)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(6, device=device)
    if "mask" in options:
        options["mask"] = torch.rand(*options["mask"], 300, device=device) > 0.5
    check_attend(torch.randn(2, 6, 5, 128, device=device), stores, 0, coded, 300, block_size, **options)


@given(
    head_dim=st.sampled_from(fmt.HEAD_DIMS),
    formats=st.tuples(st.sampled_from(list(fmt.FORMATS)), st.sampled_from(list(fmt.FORMATS))),
    block_size=st.sampled_from([0, 8, 32]),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    tokens=st.integers(1, 40),
    length=st.integers(1, 200),
    window=st.sampled_from([0, 1, 17, 150]),
    softcap=st.sampled_from([0.0, 5.0]),
    has_sinks=st.booleans(),
    sink_length=st.sampled_from([0, 1, 5, 300]),
    padding=st.lists(st.integers(0, 220), min_size=3, max_size=3) | st.none(),
    seed=st.integers(0, 2**16),
)
def test_attend_anything(
    head_dim: int,
    formats: tuple[str, str],
    block_size: int,
    batch: int,
    kv_heads: int,
    group: int,
    tokens: int,
    length: int,
    window: int,
    softcap: float,
    has_sinks: bool,
    sink_length: int,
    padding: list[int] | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        starts = None if padding is None else torch.tensor(padding[:batch], dtype=torch.int32)
        first = {"block_size": block_size, "sink_length": sink_length, "starts": starts}
        stores, coded = filled(*formats, head_dim, length, "cpu", batch=batch, heads=kv_heads, **first)
        q = torch.randn(batch, kv_heads * group, min(tokens, length), head_dim)
        sinks = torch.randn(kv_heads * group) if has_sinks else None
        check_attend(q, stores, 0, coded, length, **first, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_lose_no_more_than_plain_attention(dtype: torch.dtype, device: str) -> None:
    stores, coded = filled("tq8", "tq4", 128, 500, device, block_size=32)
    q = torch.randn(2, 6, 3, 128, device=device).to(dtype)
    k, v = tqattn.decode_kv(*stores, 128, 0, coded, 500, 32)
    out, _ = tqattn.attend(q, *stores, 0, coded, 500, 32, causal=False)
    expected, _ = exact_attention(q, k, v, causal=False)
    rows = (x.cpu().to(dtype) for x in (q, k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(*rows, enable_gqa=True)
    assert out.dtype == dtype
    assert relative_error(out, expected) < 2 * relative_error(plain, expected)


@given(
    formats=st.tuples(st.sampled_from(list(fmt.FORMATS)), st.sampled_from(list(fmt.FORMATS))),
    head_dim=st.sampled_from(fmt.HEAD_DIMS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    group=st.integers(1, 9),
    power=st.sampled_from([0.3, 1.0, 2.0]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    value_power=st.sampled_from([1.0, 3.0]),
    value_size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_attention_loses_no_more_than_twice_as_much_as_plain_attention(
    formats: tuple[str, str],
    head_dim: int,
    dtype: torch.dtype,
    group: int,
    power: float,
    size: float,
    value_power: float,
    value_size: float,
    seed: int,
) -> None:
    # Rotated, queries are as flat or as peaked as `power` makes them; values are of very different lengths. There are
    # many queries, since the errors of a single one are left to chance.
    torch.manual_seed(seed)
    with torch.no_grad():
        y = torch.randn(1, 2 * group, 8, head_dim)
        q = (tqattn.rotate(y.sign() * y.abs() ** power, True) * size).to(dtype)
        stores = empty_stores(*formats, head_dim, batch=1, slots=160)
        k, v = torch.randn(2, 1, 2, 150, head_dim)
        tqattn.encode_kv_(k, v * torch.randn(150, 1).abs() ** value_power * value_size, *stores, 0, 0, 150)
        k, v = tqattn.decode_kv(*stores, head_dim, 0, 150, 150)
        out, _ = tqattn.attend(q, *stores, 0, 150, 150, causal=False)
        expected, _ = exact_attention(q, k, v, causal=False)
        rows = (tqattn.rotate(x).to(dtype) for x in (q, k, v))
        plain = tqattn.rotate(torch.nn.functional.scaled_dot_product_attention(*rows, enable_gqa=True), True)
        # A logit's own rounding is an error of its weight.
        logits = q.double() @ k.repeat_interleave(group, dim=1).double().mT / math.sqrt(head_dim)
        allowed = max(2 * relative_error(plain, expected), float32_bound(150) + logits.abs().max().item() * 2**-23)
        assert relative_error(out, expected) < allowed


@pytest.mark.parametrize("norm", [-1.5, 0.0, 1e-35, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("formats", [("tq4", "tq4"), ("tq8", "tq2"), ("f16", "tq5")])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_norms_may_be_anything(formats: tuple[str, str], head_dim: int, norm: float, device: str) -> None:
    stores, coded = filled(*formats, head_dim, 90, device, block_size=0)
    stores[5][:, :, 40] = norm  # of values
    if formats[0] != "f16" and abs(norm) < 10:
        stores[1][:, :, 50] = norm
    check_attend(torch.randn(2, 6, 2, head_dim, device=device), stores, 0, coded, 90, 0)


def test_a_query_that_sees_nothing_gets_zeros(device: str) -> None:
    stores, coded = filled("tq4", "f16", 64, 30, device, block_size=16)
    q = torch.randn(2, 4, 2, 64, device=device)
    mask = torch.ones(2, 2, 30, dtype=torch.bool, device=device)
    mask[1, 0] = False
    out, lse = tqattn.attend(q, *stores, 0, coded, 30, 16, mask=mask)
    assert (out[1, :, 0] == 0).all()
    assert lse[1, :, 0].isneginf().all()
    assert lse[0].isfinite().all()
    sinks = torch.randn(4, device=device)
    out, lse = tqattn.attend(q, *stores, 0, coded, 30, 16, mask=mask, sinks=sinks)
    assert (out[1, :, 0] == 0).all()
    torch.testing.assert_close(lse[1, :, 0], sinks)
    out, lse = tqattn.attend(q, *stores, 0, 0, 0, 16)  # nothing stored yet
    assert (out == 0).all()
    assert lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_rows_may_hold_anything(dtype: torch.dtype, device: str) -> None:
    stores = empty_stores("f16", "f16", 64, slots=40, device=device)
    k, v = torch.randn(2, 2, 2, 40, 64, device=device)
    k[:, :, 7], v[:, :, 7], v[:, :, 30] = math.nan, math.nan, math.inf
    tqattn.encode_kv_(k, v, *stores, 0, 0, 40)
    mask = torch.ones(1, 1, 40, dtype=torch.bool, device=device)
    mask[..., [7, 30]] = False
    q = torch.randn(2, 4, 1, 64, device=device, dtype=dtype)
    for attend in (tqattn.attend, reference.attend):
        out, lse = attend(q, *stores, 0, 40, 40, mask=mask)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        assert attend(q, *stores, 0, 40, 40)[0].isnan().all()


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (64, torch.float16), (512, torch.float32)])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("name", ["f16", "tq4", "tq8"])
def test_a_query_does_not_know_what_comes_after_it(
    name: str, block_size: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    # The last of four tokens is NaN: the queries before it share their pass over the cache with its query.
    k, v = torch.randn(2, 2, 2, 20, head_dim, device=device)
    k[:, :, 19], v[:, :, 19] = math.nan, math.nan
    v[:, :, 18] = math.inf
    stores = empty_stores(name, name, head_dim, slots=32, block_size=block_size, tail_slots=block_size, device=device)
    coded = 16 if block_size else 20
    tqattn.encode_kv_(k, v, *stores, 0, 0, coded, block_size)
    q = torch.randn(2, 6, 4, head_dim, device=device, dtype=dtype)
    for attend in (tqattn.attend, reference.attend):
        out, lse = attend(q, *stores, 0, coded, 20, block_size)
        assert out[:, :, :2].isfinite().all()
        assert lse[:, :, :3].isfinite().all()
        assert not out[:, :, 2].isfinite().any()
        assert out[:, :, 3].isnan().all()


def test_a_sink_that_is_no_finite_number(device: str) -> None:
    stores, coded = filled("tq8", "tq4", 64, 20, device)
    sinks = torch.tensor([math.inf, -math.inf, math.nan, 1.0], device=device)
    for attend in (tqattn.attend, reference.attend):
        q = torch.randn(2, 4, 2, 64, device=device)
        for x in attend(q, *stores, 0, coded, 20, sinks=sinks):
            assert x[:, [0, 2]].isnan().all()
            assert x[:, [1, 3]].isfinite().all()


def test_sequences_of_a_batch_have_their_own_beginnings_and_ends(device: str) -> None:
    stores, coded = filled("tq6", "tq5", 96, 50, device, block_size=16)
    k, v = tqattn.decode_kv(*stores, 96, 0, coded, 50, 16)
    starts = torch.tensor([0, 13], dtype=torch.int32, device=device)
    lengths = torch.tensor([50, 41], dtype=torch.int32, device=device)
    q = torch.randn(2, 4, 3, 96, device=device)
    out, lse = tqattn.attend(q, *stores, 0, coded, 50, 16, starts=starts, lengths=lengths)
    for b in range(2):
        seen = slice(int(starts[b]), int(lengths[b]))
        expected, expected_lse = exact_attention(q[b : b + 1], k[b : b + 1, :, seen], v[b : b + 1, :, seen])
        assert relative_error(out[b : b + 1], expected) < float32_bound(50)
        assert relative_error(lse[b : b + 1], expected_lse) < 1e-5


def test_a_ring_gives_what_a_straight_store_gives(device: str) -> None:
    k, v = torch.randn(2, 2, 2, 100, 64, device=device)
    straight = empty_stores("tq4", "tq4", 64, slots=100, device=device)
    ring = empty_stores("tq4", "tq4", 64, slots=40, device=device)
    for stores in (straight, ring):
        for begin in range(0, 100, 7):
            end = min(begin + 7, 100)
            tqattn.encode_kv_(k[:, :, begin:end], v[:, :, begin:end], *stores, begin, begin, end)
    q = torch.randn(2, 4, 2, 64, device=device)
    for start in (60, 77, 99):
        a, b = (tqattn.attend(q, *s, start, 100, 100, window=30) for s in (straight, ring))
        # Sums of other parts, as positions that lie together are read together: a few last bits.
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=1e-6)


def test_strided_and_offset_inputs(device: str) -> None:
    stores = empty_stores("tq4", "tq8", 64, slots=10, device=device)
    other = clone(stores)
    k = torch.randn(2, 10, 2, 65, device=device)[..., 1:].transpose(1, 2)
    v = torch.randn(1, 1, 10, 64, device=device).expand(2, 2, 10, 64)
    tqattn.encode_kv_(k, v, *stores, 0, 0, 10)
    tqattn.encode_kv_(k.contiguous(), v.contiguous(), *other, 0, 0, 10)
    assert all(torch.equal(a, b) for a, b in zip(stores, other, strict=True) if isinstance(a, Tensor))
    q = torch.randn(2, 3, 4, 64, device=device).transpose(1, 2)
    mask = (torch.rand(10, 3, 2, device=device) > 0.3).permute(2, 1, 0)
    a = tqattn.attend(q, *stores, 0, 10, 10, mask=mask)
    b = tqattn.attend(q.contiguous(), *stores, 0, 10, 10, mask=mask.contiguous())
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stores_may_begin_at_any_word(dtype: torch.dtype, device: str) -> None:
    stores, coded = filled("tq4", "tq8", 128, 90, device, block_size=16)
    q = torch.randn(2, 4, 1, 128, device=device).to(dtype)
    expected, _ = tqattn.attend(q, *stores, 0, coded, 90, 16)
    for i, store in enumerate(stores):
        if isinstance(store, Tensor):
            flat, step = store.flatten(), 4 // store.element_size()
            moved = torch.cat([flat[:step], flat])[step:].view_as(store)
            out, _ = tqattn.attend(q, *stores[:i], moved, *stores[i + 1 :], 0, coded, 90, 16)
            # It may be another kernel that reads them.
            assert relative_error(out, expected) < 2 * max(torch.finfo(dtype).eps, float32_bound(90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_inputs_of_any_type_are_what_they_are_in_float32(head_dim: int, dtype: torch.dtype, device: str) -> None:
    stores = empty_stores("tq4", "f16", head_dim, slots=16, block_size=8, tail_slots=8, device=device)
    other = clone(stores)
    k, v = torch.randn(2, 2, 21, 2, head_dim, device=device).to(dtype).transpose(2, 3)
    k[0, 0, 3], k[1, 0, 4] = 60000, k[1, 0, 4] * 1e-7  # rotated, the first is beyond half precision
    tqattn.encode_kv_(k, v, *stores, 0, 0, 16, 8)
    tqattn.encode_kv_(k.float().contiguous(), v.float().contiguous(), *other, 0, 0, 16, 8)
    assert all(torch.equal(a, b) for a, b in zip(stores, other, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("block_size", [0, 16])
def test_threads_share_blocks(block_size: int) -> None:
    """Also where blocks are read from the tail that the same call writes."""
    tail_slots = 40 if block_size else 0
    sizes: dict[str, int] = {"batch": 1, "heads": 1, "slots": 1280, "block_size": block_size, "tail_slots": tail_slots}
    k, v = torch.randn(2, 1, 1, 1600, 512)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            stores = empty_stores("tq4", "tq8", 512, **sizes)
            position = coded = 0
            for end in (39, 1200, 1201, 1600):  # the last part overwrites the first one's slots
                coded_end = max(coded, (end - 24) // block_size * block_size) if block_size else end
                tokens = slice(position, end)
                tqattn.encode_kv_(k[:, :, tokens], v[:, :, tokens], *stores, position, coded, coded_end, block_size)
                position, coded = end, coded_end
            results.append(stores)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if isinstance(a, Tensor))


def test_decode_step_is_encode_and_attend(device: str) -> None:
    stores, coded = filled("tq4", "tq4", 128, 31, device, block_size=16)
    other = clone(stores)
    q, k, v = torch.randn(2, 6, 1, 128), torch.randn(2, 2, 1, 128), torch.randn(2, 2, 1, 128)
    q, k, v = q.to(device), k.to(device), v.to(device)
    sinks = torch.randn(6, device=device)
    out, lse = tqattn.decode_step_(q, k, v, *stores, 0, 31, coded, 32, 16, softcap=9.0, sinks=sinks)
    tqattn.encode_kv_(k, v, *other, 31, coded, 32, 16)
    expected, expected_lse = tqattn.attend(q, *other, 0, 32, 32, 16, softcap=9.0, sinks=sinks)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert all(torch.equal(a, b) for a, b in zip(stores, other, strict=True) if isinstance(a, Tensor))


def test_a_block_is_coded_without_new_tokens(device: str) -> None:
    sizes = {"slots": 32, "block_size": 16, "tail_slots": 24, "device": device}
    stores, at_once = empty_stores("tq4", "tq8", 64, **sizes), empty_stores("tq4", "tq8", 64, **sizes)
    k, v = torch.randn(2, 2, 2, 20, 64, device=device)
    tqattn.encode_kv_(k, v, *stores, 0, 0, 0, 16)
    tqattn.encode_kv_(k[:, :, :0], v[:, :, :0], *stores, 20, 0, 16, 16)
    tqattn.encode_kv_(k, v, *at_once, 0, 0, 16, 16)
    for a, b in zip(stores, at_once, strict=True):
        if isinstance(a, Tensor) and a.shape[2] != 24:
            assert torch.equal(a, b)


# Registration: fake kernels, compilation, gradients, other devices


def step_arguments(block_size: int, sink_length: int = 0) -> tuple[list[Any], dict[str, Any]]:
    stores, coded = filled("tq4", "tq8", 64, 31, "cpu", block_size=block_size, sink_length=sink_length)
    q, kv = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64)
    if not block_size:
        stores = [torch.cat([s, s], 2) if isinstance(s, Tensor) else s for s in stores]
    coded_end = 32
    options = {"sinks": torch.randn(4), "starts": torch.tensor([0, 3], dtype=torch.int32)}
    return [q, kv, kv, *stores, 0, 31, coded, coded_end, block_size, sink_length], options


@pytest.mark.parametrize("sink_length", [0, 3])
@pytest.mark.parametrize("block_size", [0, 16])
def test_opcheck(block_size: int, sink_length: int) -> None:
    stores, coded = filled("tq4", "tq8", 64, 31, "cpu", block_size=block_size, sink_length=sink_length)
    q, kv = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64)
    positions = (0, coded, 31, block_size, sink_length)
    cases = [
        (tqattn.rotate, (q,), {}),
        (tqattn.attend, (q, *stores, *positions), {"mask": torch.ones(1, 1, 31, dtype=torch.bool)}),
        (tqattn.decode_kv, (*stores, 64, *positions), {}),
    ]
    arguments, options = step_arguments(block_size, sink_length)
    cases.append((tqattn.decode_step_, tuple(arguments), options))
    encoded = (kv, kv, *arguments[3:13], 31, coded, 32, block_size, sink_length)
    cases.append((tqattn.encode_kv_, encoded, {}))
    for operator, args, kwargs in cases:
        torch.library.opcheck(operator.default, args, kwargs)


def test_compiles_into_one_graph() -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, stores: list[Any], position: int) -> Tensor:
        out, lse = tqattn.decode_step_(q, k, v, *stores, 0, position, 16 * (position // 16), 16 * (position // 16), 16)
        return out * 2 + lse[..., None]

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    stores, _ = filled("tq4", "tq8", 64, 16, "cpu", block_size=16, slots=64)
    other = clone(stores)
    for position in range(16, 24):
        q, k, v = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
        assert torch.equal(compiled(q, k, v, stores, position), decode(q, k, v, other, position))
    assert all(torch.equal(a, b) for a, b in zip(stores, other, strict=True) if isinstance(a, Tensor))


def test_meta_tensors_give_shapes_and_the_same_errors() -> None:
    arguments, options = step_arguments(16)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    options = {name: x.to("meta") for name, x in options.items()}
    out, lse = tqattn.decode_step_(*meta, **options)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 1, 64), (2, 4, 1), "meta")
    meta[0] = meta[0][..., :63]
    with pytest.raises(ValueError, match="unsupported head_dim 63; choose one of 64, 80"):
        tqattn.decode_step_(*meta, **options)


def test_gradients_are_refused() -> None:
    x = torch.randn(2, 64, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="rotate has no gradient, but its argument x"):
        tqattn.rotate(x)
    assert not tqattn.rotate(x).requires_grad  # fine under no_grad
    with torch.enable_grad():
        assert not tqattn.rotate(x.detach()).requires_grad


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_every_operator_has_the_guard_against_gradients(name: str) -> None:
    table = torch._C._dispatch_dump_table(f"tqattn::{name}").splitlines()
    assert "autograd.cpp" in next(row for row in table if row.startswith("AutogradCPU:"))


@pytest.mark.parametrize("name", [*ops.OPERATORS, "launch_policy"])
def test_every_operator_may_be_compiled(name: str) -> None:
    assert torch.Tag.pt2_compliant_tag in getattr(tqattn, name).default.tags


def test_a_device_without_kernels_runs_the_checked_reference() -> None:
    for name in ops.OPERATORS:
        table = torch._C._dispatch_dump_table(f"tqattn::{name}")
        line = next(row for row in table.splitlines() if row.startswith("XPU:"))
        assert "[default backend kernel]" in line, name
    arguments, options = step_arguments(16, sink_length=3)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    meta[0] = meta[0].double()
    with pytest.raises(ValueError, match="q must be float32, float16 or bfloat16, got Double"):
        ops.with_checks("decode_step_")(*meta)
    other = clone(arguments)
    got = ops.with_checks("decode_step_")(*arguments, **options)
    expected = reference.decode_step_(*other, **options)
    assert torch.equal(got[0], expected[0])


def test_every_operator_is_listed_for_the_fallback() -> None:
    defined = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "tqattn::" in name
    }
    assert defined - {"launch_policy"} == set(ops.OPERATORS)


# Wrong calls

WRONG_ATTEND = [
    ("q", lambda a: a["q"][0], "q must be .batch, heads, tokens, head_dim., got shape"),
    ("q", lambda a: a["q"].double(), "q must be float32, float16 or bfloat16, got Double"),
    ("q", lambda a: a["q"][..., :48], "unsupported head_dim 48; choose one of 64, 80, 96, 128, 192, 256, 512"),
    ("q", lambda a: a["q"][:, :3], "3 query heads must be divisible by the 2 KV heads"),
    ("q", lambda a: a["q"][:, :0], "at least one head"),
    ("q", lambda a: a["q"][:1], "q has a batch of 1 but the stores have 2"),
    ("k_format", lambda a: "tq7", "unknown storage format 'tq7'; choose one of f16, tq2, tq3"),
    ("k_format", lambda a: "tq8", "k_codes must have rows of 64 for format tq8 and head_dim 64, got 32"),
    ("k_format", lambda a: "f16", "k_codes must be Half, got Byte"),
    ("k_codes", lambda a: a["k_codes"].int(), "k_codes must be Byte, got Int"),
    ("k_codes", lambda a: a["k_codes"][0], "k_codes must be .batch, kv_heads, slots, row., got shape"),
    ("k_codes", lambda a: a["k_codes"].transpose(0, 1), "k_codes must be contiguous"),
    ("k_codes", lambda a: a["k_codes"].to("meta"), "k_codes is on meta but the first argument is on cpu"),
    ("k_codes", lambda a: a["k_codes"][:, :, :16].contiguous(), "k_norms must be .batch, kv_heads, slots."),
    ("k_norms", lambda a: None, "k_norms are missing: format tq4 needs them"),
    ("v_norms", lambda a: a["k_norms"], "v_norms were given, but format f16 has none"),
    ("k_norms", lambda a: a["k_norms"].double(), "k_norms must be Float, got Double"),
    ("k_means", lambda a: a["k_means"][..., :32].contiguous(), "k_means must be"),
    ("k_tail", lambda a: None, "k_tail must be given exactly when block_size or sink_length is positive; they are 16"),
    ("sink_length", lambda a: -1, "sink_length must be 0 .none. or positive, got -1"),
    ("sink_length", lambda a: 25, "k_tail must have a row for each of sink_length 25 tokens, got 24 rows"),
    ("sink_length", lambda a: 20, "positions 32 to 40 do not fit a tail of 4 slots"),
    ("v_tail", lambda a: a["v_tail"][:, :, :20].contiguous(), "k and v stores must have the same"),
    ("block_size", lambda a: 0, "k_means were given, but block_size is 0"),
    ("block_size", lambda a: -1, "block_size must be 0 .no blocks. or 1 to 2.31 - 1, got -1"),
    ("block_size", lambda a: 2**32, "block_size must be 0 .no blocks. or 1 to 2.31 - 1, got 4294967296"),
    ("block_size", lambda a: 24, "32 slots are no multiple of block_size 24"),
    ("coded", lambda a: 17, "coded must be a multiple of block_size 16, got 17"),
    ("coded", lambda a: 64, "0 <= coded <= length"),
    ("start", lambda a: -1, "0 <= start <= length"),
    ("start", lambda a: 41, "0 <= start <= length"),
    ("length", lambda a: 2**31, "do not fit|2.31 - 1"),
    ("length", lambda a: 60, "positions 32 to 60 do not fit a tail of 24 slots"),
    ("softcap", lambda a: -1.0, "softcap must be 0 .none. or a positive number, got -1"),
    ("softcap", lambda a: math.nan, "softcap must be"),
    ("scale", lambda a: math.inf, "scale must be finite, got inf"),
    ("window", lambda a: -1, "window must be 0 .none. or positive, got -1"),
    ("sinks", lambda a: torch.zeros(3), "sinks must be .heads. = .4., got shape .3."),
    ("sinks", lambda a: torch.zeros(4, dtype=torch.int32), "sinks must be float32"),
    ("mask", lambda a: torch.ones(1, 1, 40), "mask must be bool"),
    ("mask", lambda a: torch.ones(1, 1, 39, dtype=torch.bool), "mask must be .1 or batch, 1 or tokens, positions."),
    ("mask", lambda a: torch.ones(3, 1, 40, dtype=torch.bool), "mask must be"),
    ("starts", lambda a: torch.zeros(2), "starts must be int32, got Float"),
    ("lengths", lambda a: torch.zeros(3, dtype=torch.int32), "lengths must be .batch. = .2., got shape .3."),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_ATTEND, ids=[f"{n}-{m}" for n, _, m in WRONG_ATTEND])
def test_attend_refuses(name: str, change: Any, message: str) -> None:
    stores, coded = filled("tq4", "f16", 64, 40, "cpu", block_size=16, slots=32)
    names = [
        "k_codes",
        "k_norms",
        "k_means",
        "k_tail",
        "v_codes",
        "v_norms",
        "v_means",
        "v_tail",
        "k_format",
        "v_format",
    ]
    arguments = dict(zip(names, stores, strict=True))
    arguments |= {"q": torch.randn(2, 4, 1, 64), "start": 0, "coded": coded, "length": 40, "block_size": 16}
    tqattn.attend(**arguments)
    with pytest.raises(ValueError, match=message):
        tqattn.attend(**{**arguments, name: change(arguments)})


WRONG_ENCODE = [
    ({"k": torch.zeros(2, 2, 1, 64).int()}, "k must be float32, float16 or bfloat16, got Int"),
    ({"k": torch.zeros(2, 2, 64)}, "k must be .batch, kv_heads, tokens, head_dim., got shape"),
    ({"v": torch.zeros(2, 2, 2, 64)}, "k and v must have the same shape"),
    (
        {"k": torch.zeros(2, 3, 1, 64), "v": torch.zeros(2, 3, 1, 64)},
        "k must be .2, 2, tokens, head_dim. like its store",
    ),
    ({"v": torch.zeros(2, 2, 1, 64, device="meta")}, "k is on cpu and v on meta"),
    ({"position": -1}, "position must be 0 to 2"),
    ({"coded": 48}, "0 <= coded <= position"),
    ({"coded_end": 16}, "coded <= coded_end"),
    ({"coded_end": 40}, "multiples of block_size 16"),
    ({"position": 57}, "must fit a tail of 24 slots"),
    ({"starts": torch.zeros(3, dtype=torch.int32)}, "starts must be .batch."),
    ({"encode": "slow"}, "unknown encode 'slow'; choose fast or best .* or plain"),
    ({"block_size": 2**32}, "block_size must be 0 .no blocks. or 1 to 2.31 - 1, got 4294967296"),
    ({"sink_length": 25}, "k_tail must have a row for each of sink_length 25 tokens, got 24 rows"),
    ({"sink_length": 20}, "must fit a tail of 4 slots"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ENCODE, ids=[m for _, m in WRONG_ENCODE])
def test_encode_refuses_and_leaves_the_stores_alone(change: dict[str, Any], message: str) -> None:
    stores, coded = filled("tq4", "f16", 64, 40, "cpu", block_size=16, slots=32)
    before = clone(stores)
    token = {"k": torch.zeros(2, 2, 1, 64), "v": torch.zeros(2, 2, 1, 64)}
    positions = {"position": 40, "coded": coded, "coded_end": coded, "block_size": 16}
    call = {**token, **positions, **change}
    with pytest.raises(ValueError, match=message):
        tqattn.encode_kv_(call.pop("k"), call.pop("v"), *stores, **call)
    assert all(torch.equal(a, b) for a, b in zip(stores, before, strict=True) if isinstance(a, Tensor))


def test_a_refused_step_has_written_nothing() -> None:
    arguments, _ = step_arguments(16)
    before = clone(arguments)
    with pytest.raises(ValueError, match="window must be"):
        tqattn.decode_step_(*arguments, window=-1)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor))


# The kernels of other instruction sets


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor's best are tested already"
)
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    chosen = "test_attend or test_encode_agrees or test_rotation"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        f"({chosen}) and not anything and not refuses",
    ]
    run = subprocess.run(
        command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
