"""KVCache and `attention`: what is stored, what is decoded, and attention over it."""

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt

HALF_STEP = 2**-11  # relative rounding error of a half-precision number
FORMATS = list(tq.FORMATS)
CODED = [name for name, storage in tq.FORMATS.items() if storage.is_coded]
LLOYD_MAX = {2: 0.11748, 3: 0.034548, 4: 0.009501, 5: 0.0025047, 6: 0.00064424, 8: 4.1185e-5}  # of N(0, 1)


def random_kv(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)


def filled(
    k: Tensor, v: Tensor, chunks: Sequence[int] = (), left_padding: Sequence[int] | None = None, **options: Any
) -> tq.KVCache:
    """A cache with these tokens, appended in chunks of the given sizes and what is left of them at once."""
    batch, kv_heads, tokens, head_dim = k.shape
    cache = tq.KVCache(batch, kv_heads, head_dim, **{"capacity": tokens, "device": k.device, **options})
    sizes = [*chunks, tokens - sum(chunks)]
    for k_part, v_part in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        cache.append(k_part, v_part, left_padding)
        left_padding = None
    return cache


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: also of NaN, and not of 0 and -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.cpu().contiguous().view(-1).view(torch.uint8), b.cpu().contiguous().view(-1).view(torch.uint8))


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    rest_is_same = all(a[name] == b[name] for name in a if name != "tensors") and a.keys() == b.keys()
    return (
        rest_is_same
        and a["tensors"].keys() == b["tensors"].keys()
        and all(same_bytes(a["tensors"][name], b["tensors"][name]) for name in a["tensors"])
    )


def with_balance(cache: tq.KVCache, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a cache without a balance as that of this one."""
    return {**state, "tensors": {**state["tensors"], "k_balance": cache.k_balance}}


def is_half_rounded(got: Tensor, expected: Tensor) -> bool:
    """Whether each row is what comes back from rounding its rotated coordinates to half precision."""
    error = (got.cpu().double() - expected.cpu().double()).norm(dim=-1)
    return bool((error <= 1.01 * HALF_STEP * expected.cpu().double().norm(dim=-1) + 1e-30).all())


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def rotated(x: Tensor) -> Tensor:
    """The format's rotation in float64, from its definition."""
    return x.cpu().double() * fmt.signs(x.shape[-1]).double() @ fmt.hadamard(x.shape[-1]) / math.sqrt(x.shape[-1])


def groups(x: Tensor) -> Tensor:
    return rotated(x).unflatten(-1, (-1, min(x.shape[-1], fmt.NORM_GROUP)))


# What is stored


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": 16},
        {"block_size": 128},
        {"block_size": 16, "residual_length": 21},
        {"block_size": 128, "window": 40},
        {"block_size": 0, "window": 40},
        {"block_size": 16, "window": 100, "residual_length": 8},
        {"block_size": 16, "sink_length": 40},
        {"block_size": 0, "sink_length": 0},
        {"block_size": 128, "sink_length": 300, "encode": "best"},
    ],
    ids=str,
)
@pytest.mark.parametrize("formats", [("tq8", "tq4"), ("f16", "tq3"), ("f16", "f16")], ids=str)
def test_any_chunking_stores_the_same(device: str, formats: tuple[str, str], options: dict[str, Any]) -> None:
    k, v = random_kv(device, 2, 2, 290, 64)
    options = {**options, "k_format": formats[0], "v_format": formats[1]}
    whole = filled(k, v, **options)
    for chunks in ([1] * 289, [128, 128], [5, 0, 280, 1], [127, 2, 100], [16] * 18):
        other = filled(k, v, chunks, **options)
        assert same_state(whole.state_dict(), other.state_dict())
        assert all(map(same_bytes, whole.dense(), other.dense()))


@pytest.mark.parametrize("head_dim", tq.HEAD_DIMS)
@pytest.mark.parametrize("block_size", [0, 128])
@pytest.mark.parametrize("name", CODED)
def test_error_is_that_of_the_best_codebook(device: str, name: str, block_size: int, head_dim: int) -> None:
    k, v = random_kv(device, 1, 1, 2**20 // head_dim // 128 * 128 + 128, head_dim)
    cache = filled(k, v, k_format=name, v_format=name, block_size=block_size)
    coded = slice(0, k.shape[2] - 128)
    for decoded, original in zip(cache.dense(), (k, v), strict=True):
        error = relative_error(decoded[:, :, coded], original[:, :, coded]) ** 2
        assert error <= 1.03 * LLOYD_MAX[tq.FORMATS[name].bits]


@pytest.mark.parametrize("head_dim", tq.HEAD_DIMS)
@pytest.mark.parametrize("v_format", ["f16", "tq4"])
def test_f16_rounds_rotated_coordinates_to_half(device: str, head_dim: int, v_format: str) -> None:
    k, v = random_kv(device, 1, 2, 200, head_dim)
    cache = filled(k, v, k_format="f16", v_format=v_format)
    decoded, original = rotated(cache.dense()[0]), rotated(k)
    # Half's rounding, and float32's of two rotations: eps times the row's root mean square times log2(head_dim) steps.
    slack = 2 * 2**-24 * math.log2(head_dim) * original.norm(dim=-1, keepdim=True)
    assert ((decoded - original).abs() <= HALF_STEP * original.abs() + slack).all()


@pytest.mark.parametrize(("name", "limit"), [("tq4", 70), ("tq6", 102)])
def test_bytes_a_token(device: str, name: str, limit: int) -> None:
    cache = tq.KVCache(1, 1, 128, 32768, name, name, device)
    tail = 2 * (fmt.DEFAULT_SINK_LENGTH + 128) * 128 * 2  # both sides', half precision
    assert (cache.nbytes - tail) / 2 / 32768 <= limit


@pytest.mark.parametrize("head_dim", [64, 80, 512])
@pytest.mark.parametrize("block_size", [0, 16, 128])
def test_nbytes_counts_all_tensors_and_agrees_with_bytes_per_token(device: str, head_dim: int, block_size: int) -> None:
    for k_format in FORMATS:
        for v_format in FORMATS:
            cache = tq.KVCache(2, 3, head_dim, 256, k_format, v_format, device, block_size=block_size)
            assert cache.nbytes == sum(t.numel() * t.element_size() for t in tensors_in(cache))
            rows = block_size + fmt.DEFAULT_SINK_LENGTH if {k_format, v_format} != {"f16"} else 0
            tail = 2 * 3 * rows * head_dim * 2 * 2
            expected = 2 * 3 * 256 * tq.bytes_per_token(k_format, v_format, head_dim, block_size)
            assert cache.nbytes - tail == expected


def test_nbytes_counts_the_padding(device: str) -> None:
    k, v = random_kv(device, 3, 1, 4, 64)
    cache, plain = filled(k, v, left_padding=[0, 1, 2]), filled(k, v)
    assert cache.nbytes == plain.nbytes + 3 * 4 == sum(t.numel() * t.element_size() for t in tensors_in(cache))


@pytest.mark.parametrize("name", ["tq2", "tq4", "tq6"])
def test_constant_offset_in_keys_costs_nothing_with_blocks(device: str, name: str) -> None:
    k, v = random_kv(device, 1, 2, 512 + 1, 128)
    offset = torch.zeros(128, device=device)
    offset[[3, 40, 77, 126]] = 10.0

    def error(block_size: int, keys: Tensor) -> float:
        decoded = filled(keys, v, k_format=name, block_size=block_size).dense()[0]
        return float((decoded - keys)[:, :, :512].square().mean())

    assert error(128, k + offset) <= 1.1 * error(128, k)
    assert error(0, k + offset) > 2 * error(0, k)


@pytest.mark.parametrize("head_dim", tq.HEAD_DIMS)
@pytest.mark.parametrize("name", ["tq2", "tq4", "tq8"])
def test_fast_and_best_encoding_keep_group_norms_and_plain_does_not(device: str, name: str, head_dim: int) -> None:
    k, v = random_kv(device, 1, 1, 50, head_dim)
    fast, best, plain = (
        filled(k, v, k_format=name, block_size=0, sink_length=0, encode=encode).dense()[0] for encode in fmt.ENCODES
    )
    norms = groups(k).norm(dim=-1)
    assert torch.allclose(groups(fast).norm(dim=-1), norms, rtol=4e-6)
    assert torch.allclose(groups(best).norm(dim=-1), norms, rtol=4e-6)
    assert not torch.allclose(groups(plain).norm(dim=-1), norms, rtol=4e-6)
    # The same codes: only a factor for each group differs.
    directions = [groups(x) / groups(x).norm(dim=-1, keepdim=True) for x in (fast, plain)]
    assert relative_error(*directions) <= 4e-6


@pytest.mark.parametrize(("block_size", "residual_length"), [(16, 1), (16, 40), (128, 20)])
def test_the_newest_tokens_stay_dense(device: str, block_size: int, residual_length: int) -> None:
    k, v = random_kv(device, 1, 2, 300, 80)
    cache = tq.KVCache(1, 2, 80, 300, device=device, block_size=block_size, residual_length=residual_length)
    for position in range(300):
        cache.append(k[:, :, position : position + 1], v[:, :, position : position + 1])
        if position % 7 == 0 or position % block_size in (0, block_size - 1):
            newest = slice(max(0, position + 1 - residual_length), position + 1)
            for decoded, original in zip(cache.dense(), (k, v), strict=True):
                assert is_half_rounded(decoded[:, :, newest], original[:, :, newest])


@pytest.mark.parametrize("sink_length", [0, 1, 4, 40])
@pytest.mark.parametrize("block_size", [0, 16, 128])
def test_the_first_tokens_stay_dense(device: str, block_size: int, sink_length: int) -> None:
    k, v = random_kv(device, 3, 2, 300, 80)
    options: dict[str, Any] = {"block_size": block_size, "sink_length": sink_length}
    cache = filled(k, v, left_padding=PADDING, **options)
    for decoded, original in zip(cache.dense(), (k, v), strict=True):
        for i, padding in enumerate(PADDING):
            sinks = slice(padding, padding + sink_length)
            assert is_half_rounded(decoded[i, :, sinks], original[i, :, sinks])
            after = slice(padding + sink_length, padding + sink_length + 30)
            assert not is_half_rounded(decoded[i, :, after], original[i, :, after])
    q = torch.randn(3, 4, 5, 80, device=device)
    expected, _ = exact_attention(q, *cache.dense(), mask=padding_mask(device, 300))
    assert relative_error(tq.attention(q, cache), expected) <= float32_bound(300)


def test_a_cache_that_codes_nothing_has_no_tail(device: str) -> None:
    k, v = random_kv(device, 1, 1, 50, 64)
    options: dict[str, Any] = {"k_format": "f16", "v_format": "f16"}
    many, none = filled(k, v, sink_length=20, **options), filled(k, v, sink_length=0, **options)
    assert many.nbytes == none.nbytes
    assert many.state_dict()["tensors"].keys() == {"k_codes", "v_codes"}
    assert all(map(same_bytes, many.dense(), none.dense()))


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("chunks", [(1,), (5, 2), (30,), (1,) * 89], ids=len)
def test_padding_longer_than_the_first_tokens(device: str, chunks: tuple[int, ...], block_size: int) -> None:
    k, v = random_kv(device, 3, 1, 90, 64)
    options: dict[str, Any] = {"left_padding": [0, 40, 88], "block_size": block_size, "sink_length": 6}
    whole, cut = filled(k, v, **options), filled(k, v, chunks, **options)
    assert same_state(whole.state_dict(), cut.state_dict())
    for decoded, original in zip(cut.dense(), (k, v), strict=True):
        assert is_half_rounded(decoded[1, :, 40:46], original[1, :, 40:46])
        assert is_half_rounded(decoded[2, :, 88:], original[2, :, 88:])


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("keep", [1, 4, 9, 15, 16, 25, 47, 60])
def test_crop_and_new_tokens_where_sinks_are(device: str, keep: int, block_size: int) -> None:
    """Sinks of three sequences lie at 0, at 3 and at 21: within them, before them and behind them it is cut."""
    k, v = random_kv(device, 3, 2, 100, 64)
    options: dict[str, Any] = {"left_padding": PADDING, "block_size": block_size, "sink_length": 10, "capacity": 100}
    cache = filled(k, v, **options)
    cache.crop(keep)
    more_k, more_v = random_kv(device, 3, 2, 100 - keep, 64)
    cache.append(more_k, more_v)
    new_k, new_v = (torch.cat([old[:, :, :keep], new], 2) for old, new in ((k, more_k), (v, more_v)))
    expected = filled(new_k, new_v, **options)
    for decoded, original, fresh in zip(cache.dense(), (new_k, new_v), expected.dense(), strict=True):
        for i, padding in enumerate(PADDING):
            sinks = slice(padding, padding + 10)
            assert same_bytes(decoded[i, :, sinks], fresh[i, :, sinks])
            assert is_half_rounded(decoded[i, :, sinks], original[i, :, sinks])
    # Nothing is left of the forgotten sinks: forgetting them all is as never having had them.
    cache.crop(1)
    other = filled(k[:, :, :1], v[:, :, :1], **options)
    assert all(
        same_bytes(a, b)
        for (name, a), b in zip(
            cache.state_dict()["tensors"].items(), other.state_dict()["tensors"].values(), strict=True
        )
        if name.endswith("tail")
    )


@pytest.mark.parametrize("block_size", [0, 16])
def test_sinks_leave_a_window_like_other_tokens(device: str, block_size: int) -> None:
    k, v = random_kv(device, 1, 1, 120, 64)
    cache = tq.KVCache(1, 1, 64, 30, device=device, window=30, block_size=block_size, sink_length=8)
    for end in range(1, 121):
        cache.append(k[:, :, end - 1 : end], v[:, :, end - 1 : end])
        assert len(cache) == min(end, 30)
        decoded = cache.dense()[0]
        sinks = max(0, 8 - max(end - 30, 0))
        assert is_half_rounded(
            decoded[:, :, :sinks], k[:, :, max(end - 30, 0) :][:, :, : decoded.shape[2]][:, :, :sinks]
        )
        assert relative_error(decoded, k[:, :, max(end - 30, 0) : end]) < 0.01


@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_zero_vectors_decode_to_zeros(device: str, name: str, block_size: int) -> None:
    k = torch.zeros(1, 1, 40, 96, device=device)
    for decoded in filled(k, k, k_format=name, v_format=name, block_size=block_size).dense():
        assert torch.equal(decoded, k)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_stay_at_their_position(device: str, name: str, block_size: int, bad: float) -> None:
    clean_k, clean_v = random_kv(device, 1, 2, 40, 64)
    k, v = clean_k.clone(), clean_v.clone()
    positions = [5, 20, 38]
    k[:, :, positions, 7] = bad
    v[:, :, positions, 9] = bad
    others = [p for p in range(40) if p not in positions]
    limit = 1.5 * math.sqrt(LLOYD_MAX[tq.FORMATS[name].bits]) if name != "f16" else HALF_STEP
    cache = filled(k, v, k_format=name, v_format=name, block_size=block_size)
    for decoded, original in zip(cache.dense(), (clean_k, clean_v), strict=True):
        assert not decoded[:, :, positions].isfinite().any(-1).any()
        assert relative_error(decoded[:, :, others], original[:, :, others]) <= limit
    # A mask hides them altogether.
    q = torch.randn(1, 4, 3, 64, device=device)
    mask = torch.ones(1, 1, 40, dtype=torch.bool, device=device)
    mask[..., positions] = False
    dense = [x.nan_to_num(0.0, 0.0, 0.0) for x in cache.dense()]
    expected, _ = exact_attention(q, *dense, mask=mask)
    assert relative_error(tq.attention(q, cache, attn_mask=mask), expected) <= float32_bound(40)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("head_dim", [64, 96, 512])
@pytest.mark.parametrize("name", CODED)
def test_huge_and_tiny_vectors_keep_their_accuracy(device: str, name: str, head_dim: int, size: float) -> None:
    k, v = random_kv(device, 1, 1, 30, head_dim)
    options: dict[str, Any] = {"k_format": name, "v_format": name, "block_size": 0, "sink_length": 0}
    reference = filled(k, v, **options).dense()
    decoded = filled(k * size, v * size, **options).dense()
    for got, expected in zip(decoded, reference, strict=True):
        assert relative_error(got.cpu().double() / size, expected) <= math.sqrt(LLOYD_MAX[tq.FORMATS[name].bits]) / 10


@pytest.mark.parametrize("formats", [("tq8", "tq4"), ("f16", "f16")])
def test_huge_numbers_saturate_where_they_are_dense(device: str, formats: tuple[str, str]) -> None:
    k, v = random_kv(device, 1, 1, 5, 128)
    cache = filled(k * 1e30, v * 1e6, k_format=formats[0], v_format=formats[1])
    for decoded, original in zip(cache.dense(), (k, v), strict=True):
        assert decoded.isfinite().all()
        peak = rotated(decoded).abs().max()
        assert abs(float(peak) / fmt.HALF_MAX - 1) <= 1e-5
        assert (rotated(decoded).sign() == rotated(original).sign()).all()


# Attention

Q_LENS = [1, 6]


def assert_attention_is_exact(q: Tensor, cache: tq.KVCache, k: Tensor, v: Tensor, **options: Any) -> None:
    """`attention` against the oracle over k and v: all positions that the cache has seen, decoded."""
    expected, expected_lse = exact_attention(
        q,
        k,
        v,
        scale=options.get("scale"),
        softcap=options.get("softcap", 0.0),
        sinks=options.get("sinks"),
        window=cache.config.window,
        causal=options.get("causal", True),
        mask=_three_dimensional(options.get("attn_mask"), k.shape[2]),
    )
    out, lse = tq.attention(q, cache, **options, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert relative_error(out, expected) <= float32_bound(k.shape[2])
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite().cpu(), seen)
    assert torch.equal(lse.cpu()[~seen].double(), expected_lse[~seen])
    # A logit's rounding error grows with the numbers that are summed in it.
    logit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * (options.get("scale") or q.shape[-1] ** -0.5)
    assert ((lse.cpu() - expected_lse)[seen].abs() <= float32_bound(k.shape[2]) * max(abs(logit), 1.0)).all()
    assert torch.equal(tq.attention(q, cache, **options), out)


def _three_dimensional(mask: Tensor | None, positions: int) -> Tensor | None:
    """The oracle's mask, with a column for the positions that a window has left behind."""
    if mask is None:
        return None
    mask = mask[:, 0] if mask.dim() == 4 else mask
    return torch.nn.functional.pad(mask, (positions - mask.shape[-1], 0), value=True)


@pytest.mark.parametrize("head_dim", tq.HEAD_DIMS)
@pytest.mark.parametrize("k_format", FORMATS)
@pytest.mark.parametrize("q_len", Q_LENS)
def test_attention_is_exact_over_what_is_stored(device: str, q_len: int, k_format: str, head_dim: int) -> None:
    v_format = FORMATS[(FORMATS.index(k_format) + 2) % len(FORMATS)]
    k, v = random_kv(device, 2, 2, 300, head_dim)
    q = torch.randn(2, 4, q_len, head_dim, device=device)
    cache = filled(k, v, k_format=k_format, v_format=v_format)
    assert_attention_is_exact(q, cache, *cache.dense())


@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 5), (32, 2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 129, 700])
def test_attention_of_grouped_heads(device: str, tokens: int, heads: tuple[int, int], block_size: int) -> None:
    k, v = random_kv(device, 3, heads[1], tokens, 64)
    q = torch.randn(3, heads[0], min(tokens, 3), 64, device=device)
    cache = filled(k, v, block_size=block_size)
    assert_attention_is_exact(q, cache, *cache.dense())


OPTIONS: list[tuple[str, ...]] = [
    ("scale",),
    ("softcap",),
    ("sinks",),
    ("one mask",),
    ("mask of rows",),
    ("mask of sequences",),
    ("mask of four dimensions",),
    ("not causal",),
    ("scale", "softcap", "sinks", "mask of sequences", "not causal"),
    ("scale", "softcap", "sinks", "mask of four dimensions"),
]


def attention_options(names: Sequence[str], device: str, heads: int, q_len: int, positions: int) -> dict[str, Any]:
    shapes = {
        "one mask": (1, 1, positions),
        "mask of rows": (1, q_len, positions),
        "mask of sequences": (2, q_len, positions),
        "mask of four dimensions": (2, 1, q_len, positions),
    }
    options: dict[str, Any] = {}
    for name in names:
        if name in shapes:
            options["attn_mask"] = (torch.rand(shapes[name]) < 0.6).to(device)
        elif name == "not causal":
            options["causal"] = False
        else:
            options[name] = {"scale": 0.3, "softcap": 4.0, "sinks": torch.randn(heads, device=device)}[name]
    return options


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
@pytest.mark.parametrize("block_size", [0, 128])
@pytest.mark.parametrize("q_len", Q_LENS)
def test_attention_options(device: str, q_len: int, block_size: int, names: tuple[str, ...]) -> None:
    k, v = random_kv(device, 2, 2, 290, 96)
    q = torch.randn(2, 4, q_len, 96, device=device)
    cache = filled(k, v, block_size=block_size)
    assert_attention_is_exact(q, cache, *cache.dense(), **attention_options(names, device, 4, q_len, 290))


@pytest.mark.parametrize("names", [(), *OPTIONS[6:]], ids="+".join)
@pytest.mark.parametrize("window", [1, 100])
@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("q_len", Q_LENS)
def test_window_long_after_the_ring_has_wrapped(
    device: str, q_len: int, block_size: int, window: int, names: tuple[str, ...]
) -> None:
    k, v = random_kv(device, 2, 1, 1111, 64)
    q = torch.randn(2, 4, q_len, 64, device=device)
    chunks = [1, 300, 7, 128, 500, 1, 1]
    options: dict[str, Any] = {"k_format": "tq5", "v_format": "tq4", "block_size": block_size}
    ring = filled(k, v, chunks, capacity=window, window=window, **options)
    unbounded = filled(k, v, chunks, **options)
    assert len(ring) == window
    for short, long in zip(ring.dense(), unbounded.dense(), strict=True):
        assert same_bytes(short, long[:, :, -window:])
    positions = window + q_len - 1
    assert_attention_is_exact(q, ring, *unbounded.dense(), **attention_options(names, device, 4, q_len, positions))


def test_window_larger_than_the_capacity_is_no_ring(device: str) -> None:
    k, v = random_kv(device, 1, 1, 50, 64)
    q = torch.randn(1, 1, 50, 64, device=device)
    cache = filled(k, v, window=200, capacity=50)
    assert len(cache) == 50
    assert_attention_is_exact(q, cache, *cache.dense())
    with pytest.raises(ValueError, match="holds 50 of 50"):
        cache.append(k[:, :, :1], v[:, :, :1])


@pytest.mark.parametrize("formats", [("tq8", "tq4"), ("f16", "tq2"), ("tq6", "f16")], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("q_len", Q_LENS)
def test_half_precision_is_no_worse_than_pytorch(
    device: str, q_len: int, dtype: torch.dtype, head_dim: int, formats: tuple[str, str]
) -> None:
    k, v = random_kv(device, 2, 2, 200, head_dim, dtype=dtype)
    q = torch.randn(2, 4, q_len, head_dim).to(device, dtype)
    cache = filled(k, v, k_format=formats[0], v_format=formats[1])
    dense = cache.dense()
    expected, _ = exact_attention(q, *dense)
    visible = torch.ones(q_len, 200, dtype=torch.bool, device=device).tril(200 - q_len)
    rounded = [x.to(dtype).repeat_interleave(2, 1) for x in dense]
    plain = torch.nn.functional.scaled_dot_product_attention(q, *rounded, attn_mask=visible)
    out = tq.attention(q, cache)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= 2 * relative_error(plain, expected)


@pytest.mark.parametrize("block_size", [0, 16])
def test_a_query_that_sees_nothing(device: str, block_size: int) -> None:
    k, v = random_kv(device, 1, 1, 40, 64)
    q = torch.randn(1, 2, 3, 64, device=device)
    sinks = torch.tensor([-1.5, 2.0], device=device)
    mask = torch.ones(1, 3, 40, dtype=torch.bool, device=device)
    mask[:, 1] = False
    masked = filled(k, v, block_size=block_size)
    empty = tq.KVCache(1, 1, 64, 8, device=device, block_size=block_size)
    for cache, row, options in ((masked, 1, {"attn_mask": mask}), (empty, slice(None), {"causal": False})):
        out, lse = tq.attention(q, cache, **options, return_lse=True)
        assert (out[:, :, row] == 0).all()
        assert (lse[:, :, row] == -math.inf).all()
        out, lse = tq.attention(q, cache, sinks=sinks, **options, return_lse=True)
        assert (out[:, :, row] == 0).all()
        assert torch.equal(lse[:, :, row].reshape(2, -1), sinks[:, None].expand(2, lse[:, :, row].numel() // 2))
    out, _ = tq.attention(q, masked, attn_mask=mask, return_lse=True)
    assert out[:, :, [0, 2]].abs().sum() > 0


def test_step_is_append_and_attention(device: str) -> None:
    for options in ({}, {"window": 30}, {"block_size": 0}, {"k_format": "f16", "v_format": "f16"}):
        one, two = (tq.KVCache(2, 2, 64, 300, device=device, **options) for _ in range(2))
        for tokens in (5, 1, 100, 1, 30):
            k, v = random_kv(device, 2, 2, tokens, 64)
            q = torch.randn(2, 4, tokens, 64, device=device)
            out, lse = one.step(q, k, v, softcap=5.0, scale=0.2)
            two.append(k, v)
            expected, expected_lse = tq.attention(q, two, softcap=5.0, scale=0.2, return_lse=True)
            assert same_bytes(out, expected)
            assert same_bytes(lse, expected_lse)
        assert same_state(one.state_dict(), two.state_dict())


# Crop


@pytest.mark.parametrize("formats", [("tq8", "tq4"), ("tq2", "f16"), ("f16", "f16")], ids=str)
@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("keep", [300, 299, 289, 256, 200, 17, 16, 15, 1, 0])
def test_crop_keeps_the_oldest(device: str, keep: int, block_size: int, formats: tuple[str, str]) -> None:
    k, v = random_kv(device, 2, 1, 300, 64)
    options: dict[str, Any] = {"k_format": formats[0], "v_format": formats[1], "block_size": block_size}
    cache = filled(k, v, capacity=310, **options)
    before = cache.dense()
    relative = copy.deepcopy(cache)
    cache.crop(keep)
    assert len(cache) == keep
    for now, then in zip(cache.dense(), before, strict=True):
        assert is_half_rounded(now, then[:, :, :keep])
    if keep < 300:
        relative.crop(keep - 300)
        assert same_state(relative.state_dict(), cache.state_dict())
    more_k, more_v = random_kv(device, 2, 1, 310 - keep, 64)
    cache.append(more_k, more_v)
    assert len(cache) == 310
    q = torch.randn(2, 2, 4, 64, device=device)
    assert_attention_is_exact(q, cache, *cache.dense())
    if keep == 0:  # nothing of what was forgotten is left
        assert same_state(cache.state_dict(), filled(more_k, more_v, **options).state_dict())


@pytest.mark.parametrize("residual_length", [0, 20])
def test_crop_within_the_tail_changes_nothing_else(device: str, residual_length: int) -> None:
    k, v = random_kv(device, 1, 1, 100, 64)
    options: dict[str, Any] = {"block_size": 16, "residual_length": residual_length}
    cache = filled(k, v, **options)
    expected = filled(k[:, :, :98], v[:, :, :98], capacity=100, **options).state_dict()
    cache.crop(98)
    assert same_state(cache.state_dict(), expected)


@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("window", [16, 100])
def test_crop_of_a_window(device: str, window: int, block_size: int) -> None:
    k, v = random_kv(device, 1, 1, 777, 64)
    options: dict[str, Any] = {"window": window, "capacity": window, "block_size": block_size}
    unbounded = filled(k, v, block_size=block_size).dense()
    for keep in (window, window - 1, window // 2, 1, 0):
        cache = filled(k, v, **options)
        cache.crop(keep)
        assert len(cache) == keep
        begin = 777 - window
        for now, then in zip(cache.dense(), unbounded, strict=True):
            assert is_half_rounded(now, then[:, :, begin : begin + keep])
        cache.append(k[:, :, :3], v[:, :, :3])
        assert len(cache) == min(window, keep + 3)
    for forget in (1, window // 2, window):
        cache = filled(k, v, **options)
        cache.crop(-forget)
        assert len(cache) == window  # the ring keeps more than the window
        for now, then in zip(cache.dense(), unbounded, strict=True):
            assert is_half_rounded(now, then[:, :, 777 - forget - window : 777 - forget])
        q = torch.randn(1, 1, 1, 64, device=device)
        assert relative_error(tq.attention(q, cache), exact_attention(q, *cache.dense())[0]) <= float32_bound(window)


@pytest.mark.parametrize("length", [-11, 11, 1000])
def test_crop_out_of_range(device: str, length: int) -> None:
    cache = filled(*random_kv(device, 1, 1, 10, 64))
    before = cache.state_dict()
    with pytest.raises(ValueError, match=rf"cannot crop to {length}: the cache holds 10 .* -10 to 10"):
        cache.crop(length)
    assert same_state(cache.state_dict(), before)


def test_queries_older_than_what_is_left_are_refused(device: str) -> None:
    cache = filled(*random_kv(device, 1, 1, 300, 64), window=20)
    cache.crop(3)
    q = torch.randn(1, 1, 4, 64, device=device)
    with pytest.raises(ValueError, match="q has 4 tokens but the cache holds 3"):
        tq.attention(q, cache)
    assert_attention_is_exact(q[:, :, 1:], cache, *cache.dense())


# Padding

PADDING = [0, 3, 21]


def padding_mask(device: str, tokens: int) -> Tensor:
    return torch.arange(tokens, device=device)[None, None] >= torch.tensor(PADDING, device=device)[:, None, None]


def test_a_padded_sequence_is_as_if_alone_without_blocks(device: str) -> None:
    k, v = random_kv(device, 3, 2, 40, 64)
    q = torch.randn(3, 4, 40, 64, device=device)
    out = tq.attention(q, filled(k, v, left_padding=PADDING, block_size=0))
    for i, padding in enumerate(PADDING):
        row = slice(i, i + 1)
        alone = filled(k[row, :, padding:], v[row, :, padding:], block_size=0)
        expected = tq.attention(q[row, :, padding:], alone)
        assert relative_error(out[row, :, padding:], expected) <= 2 * float32_bound(40)
        assert (out[row, :, :padding] == 0).all()


@pytest.mark.parametrize("options", [{"block_size": 16}, {}, {"block_size": 16, "residual_length": 9}], ids=str)
@pytest.mark.parametrize("chunks", [(), (5,), (5, 1, 1, 10), (1,) * 39], ids=len)
def test_padding_is_not_seen_with_blocks(device: str, chunks: tuple[int, ...], options: dict[str, Any]) -> None:
    k, v = random_kv(device, 3, 2, 40, 64)
    q = torch.randn(3, 4, 6, 64, device=device)
    cache = filled(k, v, chunks, left_padding=PADDING, **options)
    dense = cache.dense()
    expected, expected_lse = exact_attention(q, *dense, mask=padding_mask(device, 40))
    out, lse = tq.attention(q, cache, return_lse=True)
    assert relative_error(out, expected) <= float32_bound(40)
    assert relative_error(lse, expected_lse) <= float32_bound(40)
    for decoded, original in zip(dense, (k, v), strict=True):
        for i, padding in enumerate(PADDING):
            assert (decoded[i, :, :padding] == 0).all()
            assert relative_error(decoded[i, :, padding:], original[i, :, padding:]) <= 1.5 * math.sqrt(LLOYD_MAX[4])


@pytest.mark.parametrize("garbage", [1e30, math.nan, -math.inf])
@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("chunks", [(), (5,)], ids=len)
def test_what_is_in_the_padding_changes_nothing(
    device: str, chunks: tuple[int, ...], block_size: int, garbage: float
) -> None:
    k, v = random_kv(device, 3, 2, 40, 64)
    hidden = ~padding_mask(device, 40)[:, 0, :, None]
    states = []
    for content in (0.0, garbage):
        padded = [x.masked_fill(hidden[:, None], content) for x in (k, v)]
        states.append(filled(*padded, chunks, left_padding=PADDING, block_size=block_size).state_dict())
    assert same_state(*states)


def test_padding_of_a_window(device: str) -> None:
    k, v = random_kv(device, 3, 1, 200, 64)
    q = torch.randn(3, 1, 5, 64, device=device)
    for tokens in (30, 200):
        part = k[:, :, :tokens], v[:, :, :tokens]
        cache = filled(*part, left_padding=PADDING, window=16, block_size=16)
        unbounded = filled(*part, left_padding=PADDING, block_size=16).dense()
        expected, _ = exact_attention(q, *unbounded, window=16, mask=padding_mask(device, tokens))
        assert relative_error(tq.attention(q, cache), expected) <= float32_bound(tokens)


@pytest.mark.parametrize("dtype", [None, torch.int64, torch.int32], ids=str)
def test_padding_is_a_list_or_a_tensor(device: str, dtype: torch.dtype | None) -> None:
    k, v = random_kv(device, 3, 1, 30, 64)
    padding: Any = torch.tensor(PADDING, dtype=dtype, device=device) if dtype else PADDING
    cache = tq.KVCache(3, 1, 64, 30, device=device)
    cache.append(k, v, left_padding=padding)
    assert same_state(cache.state_dict(), filled(k, v, left_padding=PADDING).state_dict())


@pytest.mark.parametrize("padding", [[1], [0, 0, -1], [0.5, 1, 2], [[1, 2, 3]], 3], ids=str)
def test_padding_that_does_not_fit_the_batch(device: str, padding: Any) -> None:
    k, v = random_kv(device, 3, 1, 4, 64)
    cache = tq.KVCache(3, 1, 64, 30, device=device)
    with pytest.raises(ValueError, match="left_padding must be 3 counts, one a sequence"):
        cache.append(k, v, left_padding=padding)
    assert len(cache) == 0


def test_padding_comes_first(device: str) -> None:
    k, v = random_kv(device, 2, 1, 4, 64)
    cache = filled(k, v, capacity=8)
    before = cache.state_dict()
    with pytest.raises(ValueError, match="with the first tokens, but the cache holds 4"):
        cache.append(k, v, left_padding=[0, 1])
    assert same_state(cache.state_dict(), before)


# The batch, and copies


@pytest.mark.parametrize("options", [{}, {"block_size": 16, "window": 20}, {"block_size": 0}], ids=str)
def test_reorder_and_select(device: str, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 3, 2, 60, 64)
    for method, index in (("reorder", [2, 0, 0]), ("select", [1]), ("select", [2, 1, 2, 0, 0])):
        for given_index in (index, torch.tensor(index, device=device)):
            cache = filled(k, v, left_padding=PADDING, **options)
            getattr(cache, method)(given_index)
            padding = [PADDING[i] for i in index]
            expected = filled(k[index], v[index], left_padding=padding, **options)
            state, expected_state = cache.state_dict(), expected.state_dict()
            if not any(padding):
                state["tensors"].pop("starts", None)
            assert same_state(state, expected_state)
            assert cache.config.batch_size == len(index)
            q = torch.randn(len(index), 2, 1, 64, device=device)
            assert same_bytes(tq.attention(q, cache), tq.attention(q, expected))


@pytest.mark.parametrize(
    "index", [[0, 1, 3], [-1, 0, 1], [], [[0, 1, 2]], [0.0, 1.0, 2.0], [True, False, True]], ids=str
)
@pytest.mark.parametrize("method", ["reorder", "select"])
def test_index_that_names_no_sequences(device: str, method: str, index: Any) -> None:
    cache = filled(*random_kv(device, 3, 1, 4, 64))
    before = cache.state_dict()
    with pytest.raises(ValueError, match="must name sequences 0 to 2"):
        getattr(cache, method)(index)
    assert same_state(cache.state_dict(), before)


def test_reorder_keeps_the_batch_size(device: str) -> None:
    cache = filled(*random_kv(device, 3, 1, 4, 64))
    with pytest.raises(ValueError, match="each of 3 sequences, got 2; use select"):
        cache.reorder([0, 1])


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"block_size": 0}], ids=str)
def test_reset_forgets_everything(device: str, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 2, 1, 200, 64)
    cache = filled(k * math.nan, v * math.nan, left_padding=[0, 3], **options)
    cache.reset()
    assert len(cache) == 0
    assert cache.dense()[0].shape == (2, 1, 0, 64)
    cache.append(k, v)
    assert same_state(cache.state_dict(), filled(k, v, **options).state_dict())


def test_deepcopy_is_independent(device: str) -> None:
    k, v = random_kv(device, 2, 1, 140, 64)
    cache = filled(k, v, left_padding=[0, 3], capacity=300)
    before = cache.state_dict()
    other = copy.deepcopy(cache)
    assert same_state(other.state_dict(), before)
    other.append(k, v)
    assert same_state(cache.state_dict(), before)
    cache.reset()
    assert len(other) == 280


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"block_size": 0}, {"v_format": "f16"}], ids=str)
@pytest.mark.parametrize("tokens", [0, 7, 128, 300])
def test_state_dict_is_everything(device: str, tokens: int, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 2, 1, tokens, 64)
    options = {"capacity": 400, **options}
    cache = filled(k, v, left_padding=[0, 3], **options)
    state = cache.state_dict()
    other = filled(*random_kv(device, 2, 1, 222, 64), left_padding=[1, 0], **options)
    other.load_state_dict(state)
    assert same_state(other.state_dict(), state)
    more = random_kv(device, 2, 1, 60, 64)
    for either in (cache, other):
        either.append(*more)
    assert same_state(other.state_dict(), cache.state_dict())
    assert all(map(same_bytes, other.dense(), cache.dense()))
    assert not same_state(state, cache.state_dict())  # a copy, not a view


OTHER_CONFIGS = {
    "batch_size": 1,
    "num_kv_heads": 2,
    "head_dim": 80,
    "capacity": 41,
    "k_format": "tq6",
    "v_format": "tq5",
    "window": 8,
    "block_size": 16,
    "residual_length": 1,
    "encode": "plain",
    "sink_length": 0,
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_state_of_another_configuration_is_refused(device: str, name: str) -> None:
    cache = filled(*random_kv(device, 2, 1, 30, 64), capacity=40)
    before = cache.state_dict()
    arguments = {**before["config"], "device": device, name: OTHER_CONFIGS[name]}
    with pytest.raises(ValueError, match=f"{name}.*{OTHER_CONFIGS[name]}"):
        cache.load_state_dict(tq.KVCache(**arguments).state_dict())
    assert same_state(cache.state_dict(), before)


def test_state_of_another_version_or_shape_is_refused(device: str) -> None:
    cache = filled(*random_kv(device, 2, 1, 130, 64))
    before = cache.state_dict()
    tensors = before["tensors"]
    for state, message in (
        ({**before, "version": 99}, "version 99, supported is 1"),
        ({**before, "tensors": {**tensors, "k_tail": tensors["k_tail"][:, :, :1]}}, "k_tail is"),
        ({**before, "tensors": {**tensors, "k_norms": tensors["k_norms"].half()}}, "k_norms is torch.float16"),
        ({**before, "tensors": {**tensors, "extra": tensors["k_tail"]}}, "extra"),
        ({**before, "tensors": {"k_codes": tensors["k_codes"]}}, "expected"),
        ({**before, "tensors": {**tensors, "starts": torch.zeros(3, dtype=torch.int32)}}, "starts is"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(state)
        assert same_state(cache.state_dict(), before)


def test_repr_says_what_it_is(device: str) -> None:
    cache = filled(*random_kv(device, 2, 3, 5, 64), capacity=99, k_format="tq6", v_format="tq5-byte")
    for part in ("tq6/tq5-byte", "5 of 99 tokens", "batch 2", "3 heads of 64", f"{cache.nbytes} bytes", device):
        assert part in repr(cache)


# Balanced keys


def a_balance(kv_heads: int, head_dim: int, device: str) -> Tensor:
    return (0.5 + torch.rand(kv_heads, head_dim) * 3).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"block_size": 0}, {"window": 40}, {"k_format": "f16"}], ids=str)
def test_balanced_keys_are_stored_times_it_and_queries_divided(
    device: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    balance = a_balance(2, 64, device)
    k, v = random_kv(device, 2, 2, 150, 64, dtype=dtype)
    q = torch.randn(2, 6, 5, 64).to(device, dtype)
    cache = filled(k, v, k_balance=balance, capacity=200, **options)
    plain = filled(k.float() * balance[:, None], v, capacity=200, **options)
    assert same_state(cache.state_dict(), with_balance(cache, plain.state_dict()))
    assert same_bytes(cache.dense()[0], plain.dense()[0] / balance[:, None])
    assert same_bytes(cache.dense()[1], plain.dense()[1])
    divided = q.float() / balance.repeat_interleave(3, 0)[:, None]
    expected, expected_lse = tq.attention(divided, plain, softcap=5.0, return_lse=True)
    out, lse = tq.attention(q, cache, softcap=5.0, return_lse=True)
    assert same_bytes(out, expected.to(dtype))
    assert same_bytes(lse, expected_lse)
    more_k, more_v = random_kv(device, 2, 2, 5, 64, dtype=dtype)
    out, lse = cache.step(q, more_k, more_v, scale=0.3)
    expected, expected_lse = plain.step(divided, more_k.float() * balance[:, None], more_v, scale=0.3)
    assert same_bytes(out, expected.to(dtype))
    assert same_bytes(lse, expected_lse)
    assert same_state(cache.state_dict(), with_balance(cache, plain.state_dict()))


def test_balanced_keys_are_exacter_where_queries_look(device: str) -> None:
    k, v = random_kv(device, 1, 2, 400, 128)
    q = torch.randn(1, 4, 50, 128, device=device)
    looks = torch.ones(128, device=device)
    looks[:16] = 10.0
    exact = (q * looks) @ k.repeat_interleave(2, 1).mT

    def error(balance: Tensor | None) -> float:
        decoded = filled(k, v, k_format="tq4", k_balance=balance).dense()[0]
        return relative_error((q * looks) @ decoded.repeat_interleave(2, 1).mT, exact)

    assert error(looks.sqrt().expand(2, -1)) < 0.7 * error(None)


@pytest.mark.parametrize("options", [{}, {"block_size": 16, "window": 20}, {"block_size": 0}], ids=str)
def test_a_balance_is_part_of_the_state(device: str, tmp_path: Path, options: dict[str, Any]) -> None:
    balance = a_balance(2, 64, device)
    k, v = random_kv(device, 3, 2, 60, 64)
    cache = filled(k, v, left_padding=PADDING, k_balance=balance, capacity=90, **options)
    without = filled(k, v, left_padding=PADDING, capacity=90, **options)
    assert cache.nbytes == without.nbytes + 2 * 64 * 4 == sum(t.numel() * t.element_size() for t in tensors_in(cache))
    assert "keys balanced" in repr(cache)
    assert "balanced" not in repr(without)
    assert cache.config == without.config
    hash(cache.config)
    cache.save(tmp_path / "cache")
    loaded = tq.KVCache.load(tmp_path / "cache", device)
    without.load_state_dict(cache.state_dict())
    balance.zero_()  # each has its own copy
    for other in (loaded, without, copy.deepcopy(cache)):
        assert same_state(other.state_dict(), cache.state_dict())
        assert all(map(same_bytes, other.dense(), cache.dense()))
        other.append(k[:, :, :9], v[:, :, :9])
    assert same_bytes(loaded.dense()[0], without.dense()[0])
    before = cache.dense()[0]
    cache.select([2, 0])
    assert same_bytes(cache.dense()[0], before[[2, 0]])
    cache.crop(17)
    assert is_half_rounded(*(x * cache.k_balance[:, None] for x in (cache.dense()[0], before[[2, 0], :, :17])))
    cache.reset()
    cache.append(k[:2], v[:2])
    assert relative_error(cache.dense()[0], k[:2, :, -len(cache) :]) < 0.02
    assert cache.k_balance is not None


def test_a_balance_in_a_state_is_checked(device: str) -> None:
    cache = filled(*random_kv(device, 1, 2, 5, 64), k_balance=a_balance(2, 64, device))
    state = cache.state_dict()
    for bad in (torch.zeros(2, 64), torch.ones(1, 64), torch.ones(2, 64).half()):
        with pytest.raises(ValueError, match="k_balance must be"):
            cache.load_state_dict({**state, "tensors": {**state["tensors"], "k_balance": bad}})
    assert same_state(cache.state_dict(), state)


def test_without_a_balance_nothing_is_copied(device: str) -> None:
    k, v = random_kv(device, 1, 1, 5, 64)
    cache = filled(k, v)
    assert cache._balanced_keys(k) is k
    assert cache._balanced_queries(k) is k


# What is refused, and what is taken as it comes


@pytest.mark.parametrize("capacity", [1, 5, 16, 50])
@pytest.mark.parametrize("block_size", [0, 16])
@pytest.mark.parametrize("held", [0, 1, 40])
def test_no_token_beyond_the_capacity(device: str, held: int, block_size: int, capacity: int) -> None:
    held = min(held, capacity)
    k, v = random_kv(device, 1, 1, capacity + 1, 64)
    cache = filled(k[:, :, :held], v[:, :, :held], capacity=capacity, block_size=block_size)
    before = cache.state_dict()
    for tokens in {capacity - held + 1, capacity + 1}:
        q = torch.randn(1, 1, tokens, 64, device=device)
        too_many = k[:, :, :tokens], v[:, :, :tokens]
        for refused in (lambda new=too_many: cache.append(*new), lambda new=too_many, q=q: cache.step(q, *new)):
            with pytest.raises(ValueError, match=f"{tokens} more tokens do not fit: .* {held} of {capacity}"):
                refused()
            assert same_state(cache.state_dict(), before)
    cache.append(k[:, :, held:-1], v[:, :, held:-1])
    assert len(cache) == capacity
    assert same_state(cache.state_dict(), filled(k[:, :, :-1], v[:, :, :-1], block_size=block_size).state_dict())
    assert_attention_is_exact(torch.randn(1, 1, 1, 64, device=device), cache, *cache.dense())


@pytest.mark.parametrize("block_size", [0, 16])
def test_more_queries_than_a_window_holds(device: str, block_size: int) -> None:
    k, v = random_kv(device, 1, 1, 600, 64)
    cache = filled(k, v, window=10, block_size=block_size)
    before = cache.state_dict()
    q = torch.randn(1, 1, 300, 64, device=device)
    with pytest.raises(ValueError, match=r"300 query tokens see positions from 291 on.*at most 128 tokens at a time"):
        tq.attention(q, cache)
    with pytest.raises(ValueError, match="at most 128 tokens at a time"):
        cache.step(q, k[:, :, :300], v[:, :, :300])
    assert same_state(cache.state_dict(), before)
    tq.attention(q[:, :, :128], cache)


def test_more_queries_than_tokens(device: str) -> None:
    cache = filled(*random_kv(device, 1, 1, 3, 64))
    with pytest.raises(ValueError, match="q has 4 tokens but the cache holds 3"):
        tq.attention(torch.randn(1, 1, 4, 64, device=device), cache)


def _shape(*sizes: int) -> Tensor:
    return torch.randn(sizes)


BAD_INPUTS = {
    "three dimensions": (_shape(2, 4, 64), _shape(2, 4, 64), "must be \\[batch, kv_heads, tokens, head_dim\\]"),
    "another batch": (_shape(1, 2, 4, 64), _shape(1, 2, 4, 64), "k must be \\[2, 2, tokens"),
    "other heads": (_shape(2, 1, 4, 64), _shape(2, 1, 4, 64), "k must be \\[2, 2, tokens"),
    "another supported head_dim": (_shape(2, 2, 4, 128), _shape(2, 2, 4, 128), "128"),
    "an unsupported head_dim": (_shape(2, 2, 4, 65), _shape(2, 2, 4, 65), "head_dim 65; choose one of 64, 80"),
    "v shorter": (_shape(2, 2, 4, 64), _shape(2, 2, 3, 64), "same shape"),
    "v of another head_dim": (_shape(2, 2, 4, 64), _shape(2, 2, 4, 80), "same shape"),
    "v of three dimensions": (_shape(2, 2, 4, 64), _shape(2, 4, 64), "same shape"),
    "int": (_shape(2, 2, 4, 64).int(), _shape(2, 2, 4, 64), "k must be float32, float16 or bfloat16, got Int"),
    "float64": (_shape(2, 2, 4, 64), _shape(2, 2, 4, 64).double(), "v must be float32, .* got Double"),
    "bool": (_shape(2, 2, 4, 64) > 0, _shape(2, 2, 4, 64), "k must be float32"),
    "another device": (_shape(2, 2, 4, 64).to("meta"), _shape(2, 2, 4, 64).to("meta"), "is on .* meta"),
    "v on another device": (_shape(2, 2, 4, 64), _shape(2, 2, 4, 64).to("meta"), "k is on .* and v on meta"),
}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_keys_and_values_that_do_not_fit(device: str, case: str, balanced: bool) -> None:
    k, v, message = BAD_INPUTS[case]
    k, v = (x if x.is_meta or x.dtype == torch.float64 else x.to(device) for x in (k, v))
    balance = a_balance(2, 64, device) if balanced else None
    cache = filled(*random_kv(device, 2, 2, 5, 64), capacity=20, k_balance=balance)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=message):
        cache.append(k, v)
    assert same_state(cache.state_dict(), before)
    if k.dim() == 4:
        with pytest.raises(ValueError, match=message):
            cache.step(torch.randn(2, 2, k.shape[2], 64, device=device), k, v)
        assert same_state(cache.state_dict(), before)


BAD_ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "q of three dimensions": ({"q": _shape(2, 4, 64)}, "q must be \\[batch, heads, tokens, head_dim\\]"),
    "q of another batch": ({"q": _shape(1, 4, 1, 64)}, "batch of 1 but the stores have 2"),
    "heads that do not divide": ({"q": _shape(2, 3, 1, 64)}, "3 query heads must be divisible by the 2 KV heads"),
    "no heads": ({"q": _shape(2, 0, 1, 64)}, "at least one head"),
    "q of int": ({"q": _shape(2, 4, 1, 64).int()}, "q must be float32"),
    "q on another device": ({"q": _shape(2, 4, 1, 64).to("meta")}, "is on .* meta"),
    "negative softcap": ({"softcap": -1.0}, "softcap must be 0"),
    "softcap NaN": ({"softcap": math.nan}, "softcap must be 0"),
    "infinite scale": ({"scale": math.inf}, "scale must be finite"),
    "sinks of another size": ({"sinks": _shape(3)}, "sinks must be \\[heads\\] = \\[4\\]"),
    "sinks of int": ({"sinks": _shape(4).int()}, "sinks must be float32"),
    "mask of floats": ({"attn_mask": _shape(2, 1, 5)}, "mask must be bool"),
    "mask of other positions": ({"attn_mask": _shape(2, 1, 4) > 0}, "got shape \\[2, 1, 4\\]"),
    "mask of another batch": ({"attn_mask": _shape(3, 1, 5) > 0}, "got shape \\[3, 1, 5\\]"),
    "mask of other rows": ({"attn_mask": _shape(2, 2, 5) > 0}, "got shape \\[2, 2, 5\\]"),
    "mask of heads": ({"attn_mask": _shape(2, 4, 1, 5) > 0}, "got shape \\[2, 4, 1, 5\\]"),
    "mask of two dimensions": ({"attn_mask": _shape(1, 5) > 0}, "got shape \\[1, 5\\]"),
}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_attention_arguments_that_do_not_fit(device: str, case: str, balanced: bool) -> None:
    changes, message = BAD_ATTENTION[case]
    cache = filled(*random_kv(device, 2, 2, 5, 64), k_balance=a_balance(2, 64, device) if balanced else None)
    arguments = {"q": _shape(2, 4, 1, 64), **changes}
    arguments = {n: x.to(device) if isinstance(x, Tensor) and not x.is_meta else x for n, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        tq.attention(cache=cache, **arguments)


def test_gradients_are_refused(device: str) -> None:
    k, v = random_kv(device, 1, 1, 4, 64)
    q = torch.randn(1, 1, 1, 64, device=device)
    cache = filled(k, v, capacity=20)
    before = cache.state_dict()
    with torch.enable_grad():
        for needs_grad in (k.clone().requires_grad_(), v.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match="has no gradient"):
                cache.append(needs_grad, v)
            with pytest.raises(RuntimeError, match="has no gradient"):
                cache.append(k, needs_grad)
        with pytest.raises(RuntimeError, match="argument q requires one"):
            tq.attention(q.requires_grad_(), cache)
        with pytest.raises(RuntimeError, match="argument q requires one"):
            cache.step(q, k[:, :, :1], v[:, :, :1])
    assert same_state(cache.state_dict(), before)
    tq.attention(q, cache)  # without gradients, what requires one is taken


@pytest.mark.parametrize("block_size", [0, 16])
def test_no_tokens(device: str, block_size: int) -> None:
    nothing = random_kv(device, 2, 1, 0, 64)
    k, v = random_kv(device, 2, 1, 16, 64)
    cache = tq.KVCache(2, 1, 64, 40, device=device, block_size=block_size)
    cache.append(*nothing)
    assert len(cache) == 0
    cache.append(k, v)
    before = cache.state_dict()
    cache.append(*nothing)
    q = torch.randn(2, 2, 0, 64, device=device)
    assert tq.attention(q, cache).shape == q.shape
    out, lse = cache.step(q, *nothing)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert same_state(cache.state_dict(), before)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in memory in other ways."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    fused = torch.cat([torch.zeros_like(x), x], dim=1).transpose(1, 2).contiguous()
    flat = torch.zeros(x.numel() + 3, dtype=x.dtype, device=x.device)
    flat[3:] = x.flatten()
    return {
        "heads after tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "head_dim first": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "every second number": wide[..., ::2],
        "part of a fused projection": fused[:, :, x.shape[1] :].transpose(1, 2),
        "unaligned": flat[3:].view(x.shape),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [0, 16])
def test_memory_layout_of_the_inputs_does_not_matter(device: str, block_size: int, dtype: torch.dtype) -> None:
    k, v = random_kv(device, 2, 2, 40, 80, dtype=dtype)
    q = torch.randn(2, 4, 3, 80).to(device, dtype)
    cache = filled(k, v, block_size=block_size)
    state, out = cache.state_dict(), tq.attention(q, cache)
    for name in layouts(k):
        other_k, other_v, other_q = (layouts(x)[name] for x in (k, v, q))
        originals = [x.clone() for x in (other_k, other_v, other_q)]
        other = filled(other_k, v, block_size=block_size)
        assert same_state(filled(k, other_v, block_size=block_size).state_dict(), state), name
        assert same_state(other.state_dict(), state), name
        assert same_bytes(tq.attention(other_q, other), out), name
        assert all(map(same_bytes, originals, (other_k, other_v, other_q)))
    one_k, one_v = (x[:1, :, :1] for x in (k, v))
    expanded = filled(one_k.expand(2, -1, 40, -1), one_v.expand(2, -1, 40, -1), block_size=block_size)
    repeated = filled(one_k.repeat(2, 1, 40, 1), one_v.repeat(2, 1, 40, 1), block_size=block_size)
    assert same_state(expanded.state_dict(), repeated.state_dict())


def test_masks_and_sinks_of_any_layout(device: str) -> None:
    cache = filled(*random_kv(device, 2, 1, 30, 64))
    q = torch.randn(2, 2, 3, 64, device=device)
    mask = torch.rand(2, 3, 30, device=device) < 0.5
    sinks = torch.randn(2, device=device)
    expected = tq.attention(q, cache, attn_mask=mask, sinks=sinks)
    turned = mask.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([sinks, sinks], dim=1)[:, 0]
    assert same_bytes(tq.attention(q, cache, attn_mask=turned, sinks=strided), expected)
    rows = mask[:1, :1]
    expanded = tq.attention(q, cache, attn_mask=rows.expand(2, 3, 30))
    assert same_bytes(expanded, tq.attention(q, cache, attn_mask=rows.repeat(2, 3, 1)))


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ({"batch_size": 1.5}, "batch_size must be a positive integer, got 1.5"),
    ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
    ({"num_kv_heads": -2}, "num_kv_heads must be a positive integer, got -2"),
    ({"capacity": 0}, "capacity must be a positive integer, got 0"),
    ({"capacity": "9"}, "capacity must be a positive integer, got '9'"),
    ({"head_dim": 100}, "unsupported head_dim 100; choose one of 64, 80, 96, 128, 192, 256, 512"),
    ({"head_dim": 0}, "unsupported head_dim 0; choose one of 64"),
    ({"head_dim": "64"}, "unsupported head_dim '64'; choose one of 64"),
    ({"head_dim": 64.0}, "head_dim must be an integer, got 64.0"),
    ({"k_format": "tq7"}, "unknown storage format 'tq7'; choose one of f16, tq2, tq3, tq4"),
    ({"v_format": None}, "unknown storage format None; choose one of f16"),
    ({"v_format": 4}, "unknown storage format 4; choose one of f16"),
    ({"window": 0}, "window must be None .* or a positive integer, got 0"),
    ({"window": -1}, "window must be None .* or a positive integer, got -1"),
    ({"window": 2.5}, "window must be None .* or a positive integer, got 2.5"),
    ({"block_size": -1}, "block_size must be a non-negative integer, got -1"),
    ({"block_size": None}, "block_size must be a non-negative integer, got None"),
    ({"residual_length": -3}, "residual_length must be a non-negative integer, got -3"),
    ({"residual_length": 4, "block_size": 0}, "residual_length 4 needs blocks"),
    ({"encode": "slow"}, "unknown encode 'slow'; choose one of fast, best, plain"),
    ({"sink_length": -1}, "sink_length must be a non-negative integer, got -1"),
    ({"sink_length": 1.0}, "sink_length must be a non-negative integer, got 1.0"),
    ({"k_balance": torch.ones(1, 80)}, r"k_balance must be float32 .* = \[1, 64\], got torch.float32 \[1, 80\]"),
    ({"k_balance": torch.ones(1, 64).double()}, "k_balance must be float32 .*, got torch.float64"),
    ({"k_balance": [[1.0] * 64]}, "k_balance must be float32 .*, got .*1.0"),
    ({"k_balance": torch.zeros(1, 64)}, "k_balance must be positive and finite, got 0.0 to 0.0"),
    ({"k_balance": torch.full((1, 64), math.inf)}, "k_balance must be positive and finite, got inf to inf"),
    ({"k_balance": torch.full((1, 64), math.nan)}, "k_balance must be positive and finite, got nan to nan"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_arguments_are_named(device: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tq.KVCache(**{"batch_size": 1, "num_kv_heads": 1, "head_dim": 64, "capacity": 8, "device": device, **changes})


# Any sequence of calls


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([0, 16, 128]))
    return {
        "batch_size": draw(st.integers(1, 3)),
        "num_kv_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from(tq.HEAD_DIMS)),
        "capacity": draw(st.sampled_from([1, 40, 250, 600])),
        "k_format": draw(st.sampled_from(FORMATS)),
        "v_format": draw(st.sampled_from(FORMATS)),
        "window": draw(st.sampled_from([None, None, 1, 30, 250])),
        "block_size": block_size,
        "residual_length": draw(st.sampled_from([0, 1, 20, 150])) if block_size else 0,
        "sink_length": draw(st.sampled_from([0, 1, 4, 20, 150])),
        "encode": draw(st.sampled_from(fmt.ENCODES)),
    }


class Model:
    """What a cache of `config` must hold: the tokens themselves, of which the newest `exact` were never cropped to."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.config, self.device = config, device
        self.cache = tq.KVCache(**config, device=device)
        self.forget()

    def forget(self) -> None:
        shape = (self.config["batch_size"], self.config["num_kv_heads"], 0, self.config["head_dim"])
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)  # what may still be seen, oldest first
        self.exact = 0
        self.appended = 0  # positions that the cache counts

    @property
    def limit(self) -> int:
        return min(self.config["capacity"], self.config["window"] or self.config["capacity"])

    @property
    def is_ring(self) -> bool:
        return (self.config["window"] or math.inf) <= self.config["capacity"]

    def append(self, tokens: int) -> None:
        k, v = random_kv(self.device, *self.k.shape[:2], tokens, self.k.shape[3])
        held = len(self.cache)
        if not self.is_ring and held + tokens > self.config["capacity"]:
            with pytest.raises(ValueError, match="do not fit"):
                self.cache.append(k, v)
            return
        self.cache.append(k, v)
        self.k, self.v = (torch.cat([old, new.cpu()], dim=2) for old, new in ((self.k, k), (self.v, v)))
        self.exact += tokens
        self.appended += tokens

    def crop(self, length: int) -> None:
        before = self.cache.dense()
        held = len(self.cache)
        self.cache.crop(length)
        kept = length if length >= 0 else held + length
        self.appended = self.appended - held + kept if length else 0
        if length >= 0:
            assert len(self.cache) == length
            self.k, self.v = (x[:, :, x.shape[2] - held :][:, :, :kept] for x in (self.k, self.v))
        else:
            assert kept <= len(self.cache) <= max(self.limit, kept)
            self.k, self.v = (x[:, :, : x.shape[2] + length] for x in (self.k, self.v))
        self.exact = 0
        for now, then in zip(self.cache.dense(), before, strict=True):
            assert is_half_rounded(now[:, :, len(self.cache) - kept :], then[:, :, :kept])

    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.k, self.v = self.k[index], self.v[index]

    def save_and_load(self, path: Path) -> None:
        self.cache.save(path)
        loaded = tq.KVCache.load(path, self.device)
        assert same_state(loaded.state_dict(), self.cache.state_dict())
        self.cache = loaded

    def reset(self) -> None:
        self.cache.reset()
        self.forget()

    def check(self, queries: int) -> None:
        held = len(self.cache)
        k, v = self.cache.dense()
        assert k.shape == v.shape == (*self.k.shape[:2], held, self.k.shape[3])
        assert held <= min(self.limit, self.k.shape[2])
        if not self.is_ring or self.exact >= self.limit:
            assert held == min(self.limit, self.k.shape[2])
        for decoded, original, name in ((k, self.k, "k_format"), (v, self.v, "v_format")):
            coded = self.config[name] != "f16"
            if original.shape[2] == held == self.appended:  # the first tokens are still seen
                sinks = slice(0, self.config["sink_length"])
                assert is_half_rounded(decoded[:, :, sinks], original[:, :, sinks])
            dense = min(self.exact, held, self.config["residual_length"] if coded else held)
            assert is_half_rounded(decoded[:, :, held - dense :], original[:, :, original.shape[2] - dense :])
            bits = tq.FORMATS[self.config[name]].bits
            limit = 2 * math.sqrt(LLOYD_MAX[bits]) if coded else 2 * HALF_STEP
            assert relative_error(decoded, original[:, :, original.shape[2] - held :]) <= limit
        queries = min(queries, held) if self.config["window"] is None else 1
        q = torch.randn(k.shape[0], 2 * k.shape[1], queries, k.shape[3]).to(self.device)
        if held and queries:
            expected, _ = exact_attention(q, k, v)
            assert relative_error(tq.attention(q, self.cache), expected) <= float32_bound(held)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configurations(), data=st.data())
def test_any_sequence_of_calls(device: str, tmp_path: Path, config: dict[str, Any], data: st.DataObject) -> None:
    model = Model(config, device)
    calls = ["append"] * 4 + ["crop", "crop", "reorder", "save_and_load", "reset"]
    for call in data.draw(st.lists(st.sampled_from(calls), min_size=2, max_size=9)):
        held = len(model.cache)
        if call == "append":
            model.append(data.draw(st.integers(1, 200)))
        elif call == "crop":
            model.crop(data.draw(st.integers(-held, held)))
        elif call == "reorder":
            size = config["batch_size"]
            model.reorder(data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size)))
        elif call == "save_and_load":
            model.save_and_load(tmp_path / "cache")
        else:
            model.reset()
        model.check(data.draw(st.integers(1, 5)))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_compiled_loop_is_one_graph_that_lengths_do_not_recompile(balanced: bool) -> None:
    def loop(cache: tq.KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k, v)
        return tq.attention(q, cache) * 2

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loop, fullgraph=True, backend=counter)
    balance = a_balance(2, 64, "cpu") if balanced else None
    caches = [tq.KVCache(1, 2, 64, 64, "tq8", "tq4", block_size=16, k_balance=balance) for _ in range(2)]
    for _ in range(40):
        q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
        assert torch.equal(compiled(caches[0], q, k, v), loop(caches[1], q, k, v))
    # Lengths 0 and 1 are always special to the compiler; then any length without, and any with, a block that is coded.
    assert counter.frame_count <= 5


@pytest.mark.parametrize("window", [None, 64])
def test_a_cache_is_made_and_grown_within_a_graph(window: int | None) -> None:
    def first_step(q: Tensor, kv: Tensor) -> Tensor:
        cache = tq.KVCache(1, 2, 64, 16, block_size=16, window=window)
        cache.grow(128)
        return cache.step(q, kv, kv)[0]

    torch._dynamo.reset()
    q, kv = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64)
    assert torch.equal(torch.compile(first_step, fullgraph=True, backend="eager")(q, kv), first_step(q, kv))


def test_what_follows_from_a_configuration_follows_from_a_changed_one() -> None:
    cache = tq.KVCache(2, 2, 64, 16, "tq4", "tq4", block_size=16)
    assert (cache.config.slots, cache.config.is_ring) == (16, False)
    for change, slots in ((lambda: cache.grow(100), 96), (lambda: cache.select([0]), 96)):
        change()
        assert cache.config.slots == cache._k.codes.shape[2] == slots
    assert replace(cache.config, window=32).is_ring
    assert replace(cache.config, k_format="f16", v_format="f16").block == 0
    assert pickle.loads(pickle.dumps(cache.config)) == copy.deepcopy(cache.config) == cache.config


# Room, device, late padding


@pytest.mark.parametrize("options", [{}, {"block_size": 0}, {"window": 300}, {"window": 300, "block_size": 0}], ids=str)
def test_growing_is_having_had_the_room(device: str, options: dict[str, Any]) -> None:
    k, v = torch.randn(2, 2, 2, 900, 64, device=device)
    padding = [0, 150]
    small = tq.KVCache(2, 2, 64, 10, device=device, **options)
    large = tq.KVCache(2, 2, 64, 1000, device=device, **options)
    for begin, end, capacity in ((0, 10, 10), (10, 140, 140), (140, 141, 290), (141, 900, 1000)):
        small.grow(capacity)
        first = padding if begin == 0 else None
        for cache in (small, large):
            cache.append(k[:, :, begin:end], v[:, :, begin:end], first)
        assert all(torch.equal(a, b) for a, b in zip(small.dense(), large.dense(), strict=True))
    q = torch.randn(2, 4, 1, 64, device=device)
    assert torch.equal(tq.attention(q, small), tq.attention(q, large))
    if "window" not in options:  # a ring buffer is as large as it ever will be
        with pytest.raises(ValueError, match="capacity can only grow: it is 1000, got 999"):
            small.grow(999)


def test_moving_to_a_device_and_back(device: str) -> None:
    balance = torch.rand(2, 64, device=device) + 0.5
    cache = tq.KVCache(2, 2, 64, 300, device=device, k_balance=balance)
    cache.append(*torch.randn(2, 2, 2, 200, 64, device=device), [0, 7])
    before = cache.dense()
    cache.to("cpu")
    assert cache.device == torch.device("cpu")
    assert all(torch.allclose(a.cpu(), b, atol=1e-5) for a, b in zip(before, cache.dense(), strict=True))
    cache.to(device)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.dense(), strict=True))


def test_padding_may_go_on_but_not_come_back(device: str) -> None:
    k, v = torch.randn(2, 2, 2, 300, 64, device=device)
    whole, parts = (tq.KVCache(2, 2, 64, 300, device=device, block_size=16) for _ in range(2))
    whole.append(k, v, [5, 100])
    parts.append(k[:, :, :40], v[:, :, :40], [5, 40])
    parts.append(k[:, :, 40:90], v[:, :, 40:90], [5, 90])
    parts.append(k[:, :, 90:], v[:, :, 90:], [5, 100])
    assert all(torch.equal(a, b) for a, b in zip(whole.dense(), parts.dense(), strict=True))
    for padding in ([6, 100], [5, 99], [5, 300], [0, 0]):
        with pytest.raises(ValueError, match="left_padding comes with the first tokens"):
            parts.append(k[:, :, :1], v[:, :, :1], padding)
