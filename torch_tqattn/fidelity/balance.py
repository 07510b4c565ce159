"""Factors of key channels that put the error of coded keys where queries do not look."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import format as fmt
from .candidates import Part
from .models import Model, Text

LARGEST_RATIO = 64.0  # of a channel's factor to the typical one: a channel that is (nearly) constant or unused


def balance_keys(model: Model, texts: Sequence[Text], block_size: int = fmt.DEFAULT_BLOCK_SIZE) -> dict[int, Tensor]:
    """Each layer's k_balance for KVCache, from a model's queries and keys on some texts.

    After the rotation, codes err alike in every direction, in proportion to the length of the key. With channels of K
    stretched by f, the squared error of a logit grows with sum(q^2 / f^2) * sum(k^2 f^2), which is least where
    f^4 = mean(q^2) / mean(k^2). What counts of k is its distance from the mean of its block, which is what gets coded.

    Args:
        model, texts: as for `divergence`.
        block_size: that of the cache; 0 for none.

    Returns:
        {layer: float32 [kv_heads, head_dim] on the CPU}; the typical channel of a head has about 1.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("no texts to balance keys on")
    energies: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        queries, keys = _energies(q.float(), k.float(), block_size)
        if layer in energies:
            queries, keys = queries + energies[layer][0], keys + energies[layer][1]
        energies[layer] = queries, keys
        return [Part(slice(0, k.shape[2]), k, v)]

    for text in texts:
        model.logits(text.tokens.to(model.device), observe)
    return {layer: _factors(queries, keys) for layer, (queries, keys) in sorted(energies.items())}


def _energies(q: Tensor, k: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Mean squares [kv_heads, head_dim] of queries, and of keys around their block's mean; sinks are left out."""
    kv_heads, tokens = k.shape[1], k.shape[2]
    first = min(fmt.DEFAULT_SINK_LENGTH, tokens - 1)
    queries = q[0, :, first:].unflatten(0, (kv_heads, -1)).square().mean((1, 2))
    keys = k[0, :, first:]
    if block_size:
        keys = torch.cat([block - block.mean(1, keepdim=True) for block in keys.split(block_size, dim=1)], dim=1)
    return queries.cpu().double(), keys.square().mean(1).cpu().double()


def _factors(queries: Tensor, keys: Tensor) -> Tensor:
    # The median, not a mean: channels that are not used at all, however many, leave it as it is.
    smallest = torch.finfo(torch.float32).tiny
    factors = (queries.clamp(min=smallest) / keys.clamp(min=smallest)) ** 0.25
    typical = factors.median(-1, keepdim=True).values
    return (factors / typical).clamp(1 / LARGEST_RATIO, LARGEST_RATIO).float()
