"""Sequences that begin with padding."""

import math
from typing import Any

import pytest
import torch
from caches import (
    LLOYD_MAX,
    PADDING,
    filled,
    padding_mask,
    random_kv,
    same_state,
)
from oracle import exact_attention, float32_bound, relative_error

import torch_tqattn as tq


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
