"""What KVCache and `attention` refuse, and what they take as it comes."""

import math
from typing import Any

import pytest
import torch
from caches import (
    a_balance,
    assert_attention_is_exact,
    filled,
    random_kv,
    same_bytes,
    same_state,
)
from torch import Tensor

import torch_tqattn as tq


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
    "another batch": (_shape(1, 2, 4, 64), _shape(1, 2, 4, 64), "k has a batch of 1, the cache has one of 2"),
    "other heads": (_shape(2, 1, 4, 64), _shape(2, 1, 4, 64), "k has 1 heads, the cache has 2 KV heads"),
    "another supported head_dim": (_shape(2, 2, 4, 128), _shape(2, 2, 4, 128), "k has head_dim 128, the cache has 64"),
    "an unsupported head_dim": (_shape(2, 2, 4, 65), _shape(2, 2, 4, 65), "k has head_dim 65, the cache has 64"),
    "v shorter": (_shape(2, 2, 4, 64), _shape(2, 2, 3, 64), "same shape"),
    "v of another head_dim": (_shape(2, 2, 4, 64), _shape(2, 2, 4, 80), "same shape"),
    "v of three dimensions": (_shape(2, 2, 4, 64), _shape(2, 4, 64), "same shape"),
    "int": (_shape(2, 2, 4, 64).int(), _shape(2, 2, 4, 64), "k must be float32, float16 or bfloat16, got Int"),
    "float64": (_shape(2, 2, 4, 64), _shape(2, 2, 4, 64).double(), "v must be float32, .* got Double"),
    "bool": (_shape(2, 2, 4, 64) > 0, _shape(2, 2, 4, 64), "k must be float32"),
    "another device": (_shape(2, 2, 4, 64).to("meta"), _shape(2, 2, 4, 64).to("meta"), "k is on meta, the cache is on"),
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
    "q of another batch": ({"q": _shape(1, 4, 1, 64)}, "q has a batch of 1, the cache has one of 2"),
    "q of another head_dim": ({"q": _shape(2, 4, 1, 128)}, "q has head_dim 128, the cache has 64"),
    "heads that do not divide": (
        {"q": _shape(2, 3, 1, 64)},
        "q has 3 heads, the cache has 2 KV heads and needs a multiple",
    ),
    "no heads": ({"q": _shape(2, 0, 1, 64)}, "at least one head"),
    "q of int": ({"q": _shape(2, 4, 1, 64).int()}, "q must be float32"),
    "q on another device": ({"q": _shape(2, 4, 1, 64).to("meta")}, "q is on meta, the cache is on"),
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
    balance = a_balance(2, 64, device) if balanced else None
    cache = filled(*random_kv(device, 2, 2, 5, 64), capacity=9, k_balance=balance)
    arguments = {"q": _shape(2, 4, 1, 64), **changes}
    arguments = {n: x.to(device) if isinstance(x, Tensor) and not x.is_meta else x for n, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        tq.attention(cache=cache, **arguments)
    q = arguments["q"]
    if case.startswith("q ") and q.dim() == 4:
        with pytest.raises(ValueError, match=message):
            cache.step(q, *random_kv(device, 2, 2, 1, 64))


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
    ({"batch_size": True}, "batch_size must be a positive integer, got True"),
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
    ({"window": True}, "window must be None .* or a positive integer, got True"),
    ({"window": 2.5}, "window must be None .* or a positive integer, got 2.5"),
    ({"block_size": -1}, "block_size must be a non-negative integer, got -1"),
    ({"block_size": False}, "block_size must be a non-negative integer, got False"),
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
