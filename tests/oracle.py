"""What results are compared with: written from the definitions in float64, sharing no code with the package."""

import math

import torch
from torch import Tensor


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64, query i at position L - T + i. mask: bool [B or 1, T or 1, L].

    Returns out [B, Hq, T, D] and lse [B, Hq, T], both float64, on the CPU.
    """
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.einsum("bhtd,bhld->bhtl", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    query = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    position = torch.arange(k.shape[2])[None, :]
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible &= position <= query
    if window is not None:
        visible &= position > query - window
    visible = visible[None, None]
    if mask is not None:
        visible = visible & mask.cpu()[:, None]
    logits = logits.masked_fill(~visible, -math.inf)
    total = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.cpu().double()[None, :, None])
    weights = torch.where(visible, torch.exp(logits - total[..., None]), 0.0)
    return torch.einsum("bhtl,bhld->bhtd", weights, v), total


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite if a NaN is in only one of them."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    if not torch.equal(got.isnan(), expected.isnan()):
        return math.inf
    difference = (got - expected).nan_to_num().norm()
    return float(difference / expected.nan_to_num().norm().clamp(min=1e-300))


def float32_bound(positions: int) -> float:
    """Relative error allowed to float32 attention over this many positions: rounding errors add up like a walk."""
    return 2e-6 * math.sqrt(max(positions, 1000) / 1000)
