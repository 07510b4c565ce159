"""Caches for tests, and what they are compared with."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor

import torch_tqattn as tq

HALF_STEP = 2**-11  # relative rounding error of a half-precision number
PADDING = [0, 3, 21]  # of three sequences
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


def a_balance(kv_heads: int, head_dim: int, device: str) -> Tensor:
    return (0.5 + torch.rand(kv_heads, head_dim) * 3).to(device)


def padding_mask(device: str, tokens: int) -> Tensor:
    return torch.arange(tokens, device=device)[None, None] >= torch.tensor(PADDING, device=device)[:, None, None]
