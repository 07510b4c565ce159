"""Attention of one call's queries: over a compressed cache, over tensors, and the two merged."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...cache import KVCache

# Logits that attention over tensors computes at a time, where PyTorch does not do it.
TILE = 1 << 20


@dataclass(frozen=True)
class Queries:
    """The queries of one call, and how they attend."""

    module: nn.Module
    q: Tensor  # [batch, heads, tokens, head_dim]
    mask: Tensor | None  # [batch or 1, 1, tokens, positions]; for what is stored, bool: True where a query may look
    causal: bool  # without a mask: a query sees nothing newer than its own position, the last one the last
    scale: float
    softcap: float
    sinks: Tensor | None  # [heads]

    def part(self, rows: slice, columns: slice) -> "Queries":
        mask = None if self.mask is None else self.mask[:, :, rows, columns]
        return replace(self, q=self.q[:, :, rows], mask=mask)

    def with_mask(self, positions: int) -> "Queries":
        """The same, with the mask that None stands for."""
        if self.mask is not None or not self.causal:
            return self
        tokens = self.q.shape[2]
        mask = torch.ones(1, 1, tokens, positions, dtype=torch.bool, device=self.q.device)
        return replace(self, mask=mask.tril(positions - tokens))

    def over_stored(self, stored: KVCache, start: int) -> Tensor:
        """Attention over the positions from `start` on, the last of which belongs to the last query."""
        causal = self.causal and self.mask is None
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return stored._attend(self.q, start, mask=self.mask, causal=causal, **options)[0]

    def over_past(self, stored: KVCache, start: int) -> tuple[Tensor, Tensor]:
        """Attention and log-sum-exp over positions that are all older than the queries; the sinks are left out."""
        return stored._attend(self.q, start, scale=self.scale, softcap=self.softcap, mask=self.mask, causal=False)

    def over_dense(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over tensors and its log-sum-exp, float32, some queries at a time."""
        heads, positions = k.shape[1:3]
        k, v = k.float().transpose(2, 3), v.float()
        rows = max(1, TILE // (self.q.shape[0] * self.q.shape[1] * positions))
        tiles = []
        for begin in range(0, self.q.shape[2], rows):
            seen = begin + rows + positions - self.q.shape[2] if self.causal and self.mask is None else positions
            tile = self.part(slice(begin, begin + rows), slice(None)).with_mask(min(seen, positions))
            tiles.append(tile._tile(k[..., :seen], v[:, :, :seen], heads))
        outs, lses = zip(*tiles, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def _tile(self, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        tokens = self.q.shape[2]
        grouped = self.q.float().unflatten(1, (heads, -1)).flatten(2, 3)
        logits = (grouped @ k * self.scale).unflatten(2, (-1, tokens)).flatten(1, 2)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None:
            is_bool = self.mask.dtype == torch.bool
            logits = logits.masked_fill(~self.mask, -torch.inf) if is_bool else logits + self.mask
        lse = logits.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.float()[None, :, None])
        weights = torch.exp(logits - _finite(lse)[..., None])
        out = weights.unflatten(1, (heads, -1)).flatten(2, 3) @ v
        return out.unflatten(2, (-1, tokens)).flatten(1, 2), lse

    def over_tensors(self, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention over tensors as PyTorch has it, where it has it."""
        if self.softcap or self.sinks is not None:
            if dropout:
                raise NotImplementedError(f"tqattn has no dropout with a softcap or sinks, got {dropout}; use eager")
            return self.over_dense(k, v)[0]
        is_cut = 1 < self.q.shape[2] < k.shape[2]  # PyTorch would align the first query with the first position
        mask = self.with_mask(k.shape[2]).mask if is_cut else self.mask
        options: dict[str, Any] = {"dropout": dropout, "scaling": self.scale, "is_causal": self.causal}
        return sdpa_attention_forward(self.module, self.q, k, v, mask, **options)[0].transpose(1, 2)


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp, with a number for that of no logits: what is subtracted from it stays -inf."""
    return lse.clamp(min=-1e30)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of positions, from that over each and its log-sum-exp."""
    total = _finite(torch.logaddexp(first[1], second[1]))
    shares = [(lse - total).exp()[..., None] * out for out, lse in (first, second)]
    return shares[0] + shares[1]


def visibility(mask: Tensor | None) -> Tensor | None:
    """A mask [batch or 1, 1, tokens, positions] as bool, True where a query may look."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"tqattn takes masks [batch, 1, tokens, positions], the same for all heads, got {list(mask.shape)}; "
            "use eager attention, which reads the same cache"
        )
    if mask.dtype == torch.bool:
        return mask
    is_hidden = mask <= -1e4
    if not ((mask == 0) | is_hidden).all():
        raise NotImplementedError(
            "tqattn takes masks that hide positions, bool or 0 and at most -1e4, but this one adds other numbers to "
            "the logits; use eager attention, which reads the same cache"
        )
    return ~is_hidden
