"""KVCache.crop."""

import copy
from typing import Any

import pytest
import torch
from caches import (
    assert_attention_is_exact,
    filled,
    is_half_rounded,
    random_kv,
    same_state,
)
from oracle import exact_attention, float32_bound, relative_error

import torch_tqattn as tq


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


@pytest.mark.parametrize("length", [2.0, "2", None, torch.tensor(2.5)], ids=str)
def test_length_that_is_no_integer(device: str, length: Any) -> None:
    cache = filled(*random_kv(device, 1, 1, 5, 64))
    before = cache.state_dict()
    with pytest.raises(ValueError, match="length must be an integer from -5 to 5, got"):
        cache.crop(length)
    assert same_state(cache.state_dict(), before)


def test_length_is_kept_as_a_plain_number(device: str) -> None:
    """A tensor that counts would otherwise be carried on in the cache's own counters, and into its files."""
    cache = filled(*random_kv(device, 1, 1, 5, 64))
    cache.crop(torch.tensor(4))
    cache.crop(torch.tensor(-1))
    assert cache.state_dict()["counters"]["length"] == 3
    assert type(cache.state_dict()["counters"]["length"]) is int
