"""Attention of one token over a dense cache, in the forms that a user of PyTorch would try."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as queries of one KV head."""
    rows = q.view(1, k.shape[1], -1, q.shape[-1])
    return functional.scaled_dot_product_attention(rows, k, v).view_as(q)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.view(1, k.shape[1], -1, q.shape[-1])
    weights = torch.softmax(rows @ k.mT * q.shape[-1] ** -0.5, -1)
    return (weights @ v).view_as(q)


FORMS: dict[str, tuple[torch.dtype, Form]] = {
    "SDPA float32, enable_gqa": (torch.float32, grouped),
    "SDPA float32, heads packed": (torch.float32, packed),
    "SDPA bfloat16, heads packed": (torch.bfloat16, packed),
    "SDPA float16, heads packed": (torch.float16, packed),
    "matmul, softmax float32": (torch.float32, plain),
    "matmul, softmax bfloat16": (torch.bfloat16, plain),
}


def call(q: Tensor, caches: list[tuple[Tensor, Tensor]], form: Form) -> Callable[[int], Tensor]:
    """Attention of q [1, heads, 1, head_dim] in the caches' type."""
    query = q.to(caches[0][0].dtype)
    return lambda i: form(query, *caches[i % len(caches)])
