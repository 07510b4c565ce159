"""A KVCache with balanced keys."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import (
    PADDING,
    a_balance,
    filled,
    is_half_rounded,
    random_kv,
    same_bytes,
    same_state,
    tensors_in,
)
from oracle import relative_error
from torch import Tensor

import torch_tqattn as tq


def with_balance(cache: tq.KVCache, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a cache without a balance as that of this one."""
    return {**state, "tensors": {**state["tensors"], "k_balance": cache.k_balance}}


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
