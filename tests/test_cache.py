"""What KVCache stores, and how it decodes."""

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import (
    CODED,
    FORMATS,
    HALF_STEP,
    LLOYD_MAX,
    PADDING,
    filled,
    is_half_rounded,
    padding_mask,
    random_kv,
    same_bytes,
    same_state,
    tensors_in,
)
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt


def rotated(x: Tensor) -> Tensor:
    """The format's rotation in float64, from its definition."""
    return x.cpu().double() * fmt.signs(x.shape[-1]).double() @ fmt.hadamard(x.shape[-1]) / math.sqrt(x.shape[-1])


def groups(x: Tensor) -> Tensor:
    return rotated(x).unflatten(-1, (-1, min(x.shape[-1], fmt.NORM_GROUP)))


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
    assert cache.to("cpu") is cache
    assert cache.device == torch.device("cpu")
    assert all(torch.allclose(a.cpu(), b, atol=1e-5) for a, b in zip(before, cache.dense(), strict=True))
    assert cache.to(torch.device(device)) is cache
    assert all(torch.equal(a, b) for a, b in zip(before, cache.dense(), strict=True))


@pytest.mark.parametrize("other", [torch.float16, "half", None, torch.zeros(1)], ids=str)
def test_moving_to_what_is_no_device(device: str, other: Any) -> None:
    cache = tq.KVCache(2, 2, 64, 300, device=device)
    cache.append(*torch.randn(2, 2, 2, 200, 64, device=device))
    before = cache.dense()
    with pytest.raises(ValueError, match='moved to a device, such as "cpu" or "mps", got'):
        cache.to(other)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.dense(), strict=True))


def test_what_follows_from_a_configuration_follows_from_a_changed_one() -> None:
    cache = tq.KVCache(2, 2, 64, 16, "tq4", "tq4", block_size=16)
    assert (cache.config.slots, cache.config.is_ring) == (16, False)
    for change, slots in ((lambda: cache.grow(100), 96), (lambda: cache.select([0]), 96)):
        change()
        assert cache.config.slots == cache._k.codes.shape[2] == slots
    assert replace(cache.config, window=32).is_ring
    assert replace(cache.config, k_format="f16", v_format="f16").block == 0
    assert pickle.loads(pickle.dumps(cache.config)) == copy.deepcopy(cache.config) == cache.config
