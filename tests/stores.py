"""Operators' arguments for tests: empty stores, and stores filled by the operator under test."""

import torch
from torch import Tensor

from torch_tqattn import format as fmt

Stores = tuple[Tensor | None, ...]


def empty_side(
    format_name: str, batch: int, heads: int, slots: int, head_dim: int, block_size: int, tail_rows: int, device: str
) -> list[Tensor | None]:
    """Codes, norms, means and tail of one side, zeros."""
    storage = fmt.FORMATS[format_name]
    lead, groups = (batch, heads), storage.norms_per_row(head_dim)
    width = storage.row_bytes(head_dim) if storage.is_coded else head_dim
    codes = torch.zeros(*lead, slots, width, dtype=torch.uint8 if storage.is_coded else torch.half, device=device)
    norms = torch.zeros((*lead, slots) if groups == 1 else (*lead, slots, groups), device=device) if groups else None
    means = tail = None
    if block_size:
        means = torch.zeros(*lead, slots // block_size, head_dim, dtype=torch.half, device=device)
    if tail_rows:
        tail = torch.zeros(*lead, tail_rows, head_dim, dtype=torch.half, device=device)
    return [codes, norms, means if storage.is_coded else None, tail]


def empty_stores(
    k_format: str,
    v_format: str,
    head_dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    slots: int = 64,
    block_size: int = 0,
    tail_slots: int = 0,
    sink_length: int = 0,
    device: str = "cpu",
) -> list[Tensor | str | None]:
    """Everything between the inputs and the positions of encode_kv_, attend and decode_kv."""
    sizes = (batch, heads, slots, head_dim, block_size, sink_length + tail_slots, device)
    return [*empty_side(k_format, *sizes), *empty_side(v_format, *sizes), k_format, v_format]


def clone(arguments: list) -> list:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]
