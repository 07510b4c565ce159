"""`attention` over a KVCache, and `step`."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from caches import (
    FORMATS,
    assert_attention_is_exact,
    filled,
    random_kv,
    same_bytes,
    same_state,
)
from oracle import exact_attention, relative_error

import torch_tqattn as tq

Q_LENS = [1, 6]


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
