"""Synthetic heads that are hard to compress, each for a reason of its own."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Storage

HEAD_DIM = 128
KV_HEADS = 2
GROUP = 4  # query heads that share a KV head
QUERIES = 16
TOKENS = 2048
LONG_TOKENS = 16384


@dataclass(frozen=True)
class Head:
    """Queries [1, Hq, Q, D] that each see all of keys and values [1, Hkv, T, D]; float32."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class HeadError:
    """kld: mean KL divergence of the attention weights, in nats. error: of the output, relative to its norm (L2)."""

    kld: float
    error: float


def difficult_heads(seed: int = 0) -> Iterator[Head]:
    """The heads, one after the other; the same ones for the same seed."""
    rng = torch.Generator().manual_seed(seed)

    def normal(tokens: int = TOKENS) -> Tensor:
        return torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=rng)

    def head(name: str, k: Tensor, v: Tensor | None = None, q: Tensor | None = None, spread: float = 2.0) -> Head:
        q = torch.randn(1, KV_HEADS * GROUP, QUERIES, HEAD_DIM, generator=rng) if q is None else q
        return Head(name, scaled_queries(q, k, spread), k, normal(k.shape[2]) if v is None else v)

    def channels(count: int) -> Tensor:
        return torch.randperm(HEAD_DIM, generator=rng)[:count]

    yield head("gaussian", normal(), normal())

    # As Qwen2.5's keys: a few channels have a constant, four times the norm of what varies.
    offset = torch.zeros(HEAD_DIM)
    offset[channels(4)] = 4 * math.sqrt(HEAD_DIM) / 2
    yield head("offset", normal() + offset, normal() + offset)

    gains = torch.ones(HEAD_DIM)
    gains[channels(4)] = torch.tensor([10.0, 15.0, 20.0, 30.0])
    yield head("outliers", normal() * gains, normal() * gains)

    def student(degrees: int = 3) -> Tensor:
        chi = sum(normal().square() for _ in range(degrees))
        assert isinstance(chi, Tensor)
        return normal() / (chi / degrees).sqrt()

    yield head("heavy tails", student(), student())

    for name, norm in (("tiny", 1e-6), ("huge", 1e4)):
        scale = norm / math.sqrt(HEAD_DIM)
        yield head(name, normal() * scale, normal() * scale)

    for base in (1e4, 5e5, 1e6):
        source = slowly_varying(normal())
        positions = torch.arange(TOKENS)
        q = rotary(normal(GROUP * QUERIES).view(1, -1, QUERIES, HEAD_DIM), positions[-QUERIES:], base)
        yield head(f"rope {base:.0e}".replace("e+0", "e"), rotary(source, positions, base), normal(), q)

    k = normal(LONG_TOKENS)
    places = torch.randint(LONG_TOKENS, (GROUP * QUERIES,), generator=rng)
    yield head("16K peaked", k, q=k[:, :, places].reshape(1, -1, QUERIES, HEAD_DIM), spread=1.2)
    yield head("16K flat", normal(LONG_TOKENS), spread=0.3)


def scaled_queries(q: Tensor, k: Tensor, spread: float) -> Tensor:
    """q, scaled so that each query's logits have the standard deviation `spread` over the keys."""
    return q * (spread / logits(q, k).std(dim=-1, keepdim=True)).to(q.dtype)


def slowly_varying(noise: Tensor, memory: float = 0.99) -> Tensor:
    """A constant and a random walk that forgets, of equal size, from unit noise [..., T, D]."""
    state = noise[..., 0, :]
    rows = [state]
    for step in noise[..., 1:, :].unbind(-2):
        state = memory * state + math.sqrt(1 - memory**2) * step
        rows.append(state)
    return torch.stack(rows, dim=-2) + noise[..., :1, :].roll(1, dims=-1)


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The rotary embedding of x [..., T, D]; channel i is paired with channel i + D / 2."""
    half = x.shape[-1] // 2
    angles = torch.outer(positions.double(), base ** -(torch.arange(half).double() / half)).to(x)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Attention logits, float64 [1, Hq, Q, T]."""
    grouped = q.double().unflatten(1, (k.shape[1], -1))
    return (grouped @ k.double()[:, :, None].mT).flatten(1, 2) / math.sqrt(q.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights [1, Hq, Q, T] and output [1, Hq, Q, D], float64."""
    weights = logits(q, k).log_softmax(-1)
    out = weights.exp().unflatten(1, (k.shape[1], -1)) @ v.double()[:, :, None]
    return weights, out.flatten(1, 2)


def head_errors(
    head: Head, storages: Sequence[Storage], report: Callable[[], object] = lambda: None
) -> list[HeadError]:
    """What each storage does to one head, all of whose positions are read as codes; `report` is called after each."""
    weights, out = attend(head.q, head.k, head.v)
    errors = []
    for storage in storages:
        ((_, keys, values),) = storage.parts(head.k, head.v, "coded")
        got_weights, got_out = attend(head.q, keys, values)
        kld = (weights.exp() * (weights - got_weights)).sum(-1).mean().item()
        errors.append(HeadError(kld, ((got_out - out).norm() / out.norm()).item()))
        report()
    return errors
