"""What a cache's `update` returns: handles in place of tensors, and behind them what one forward may see."""

import operator
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...cache import KVCache
from .queries import Queries, merge


class Forward:
    """The tokens k, v of one forward, stored in `owner`, and what they may see: `attend` and `dense` are subclasses'.

    Columns of masks and rows of dense tensors are the positions from `start` on: the `past` ones before these tokens,
    then the tokens. `before` is the cache before them.
    """

    def __init__(self, owner: KVCache, k: Tensor, v: Tensor, before: KVCache | None) -> None:
        self.owner = owner  # not to be read: it may have been moved to another device, or hold other tokens
        self.before = before
        self.k, self.v = k, v
        position = owner._length - k.shape[2]
        self.start = owner._begin(k.shape[2]) if before is None else before._begin(0)
        self.past = position - self.start
        self.may_be_padding = position <= owner._most_padding
        self._dense: tuple[Tensor, Tensor] | None = None

    def attend(self, queries: Queries) -> Tensor:
        """[batch, heads, tokens, head_dim], for queries of all tokens or of the last ones."""
        raise NotImplementedError

    def dense(self) -> tuple[Tensor, Tensor]:
        """k and v [batch, kv_heads, positions, head_dim] in the model's dtype."""
        if self._dense is None:
            k, v = self._decode()
            self._dense = k.to(self.k.dtype), v.to(self.v.dtype)
        return self._dense

    def learn_padding(self, mask: Tensor | None) -> None:
        """Store the first tokens anew, without the padding on their left, which `update` could not know.

        Padding is what no query sees, its own included.
        """
        before, tokens = self.before, self.k.shape[2]
        if before is None or not self.may_be_padding or mask is None or mask.shape[2] != tokens:
            return
        self.may_be_padding = False
        hidden = self.start + (mask[:, 0].any(dim=1).cumsum(-1) == 0).sum(-1)
        known = torch.zeros_like(hidden) if before._starts is None else before._starts
        padding = hidden.where(known >= before._length, known).expand(self.k.shape[0])
        if (padding == known).all():
            return
        device = self.owner.device
        self.owner._become(before)
        self.owner.append(self.k.to(device), self.v.to(device), padding)
        self._stored_anew(padding)

    def _decode(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _stored_anew(self, padding: Tensor) -> None: ...


class Stored(Forward):
    """All is read from the cache, these tokens too: each sees what it would see if it came alone."""

    def __init__(self, owner: KVCache, k: Tensor, v: Tensor, before: KVCache | None) -> None:
        super().__init__(owner, k, v, before)
        self.stored = owner._view()

    def attend(self, queries: Queries) -> Tensor:
        return queries.over_stored(self.stored, self.start)

    def _decode(self) -> tuple[Tensor, Tensor]:
        return self.stored._dense(self.start)

    def _stored_anew(self, padding: Tensor) -> None:
        self.stored = self.owner._view()
        self.stored.to(self.k.device)


class Exact(Forward):
    """The past is read from the cache, these tokens are exact."""

    before: KVCache

    def attend(self, queries: Queries) -> Tensor:
        if not self.past:
            return queries.over_tensors(self.k, self.v)
        queries, everything = queries.with_mask(self.past + self.k.shape[2]), slice(None)
        old = replace(queries.part(everything, slice(self.past)), sinks=None)
        new = queries.part(everything, slice(self.past, None))
        return merge(old.over_past(self.before, self.start), new.over_dense(self.k, self.v))

    def _decode(self) -> tuple[Tensor, Tensor]:
        if not self.past:
            return self.k, self.v
        k, v = self.before._dense(self.start)
        return torch.cat([k, self.k.float()], dim=2), torch.cat([v, self.v.float()], dim=2)


class Stepwise(Exact):
    """As if these tokens came one by one: stored again, on a copy, in parts within which that makes no difference."""

    padding: Tensor | None = None

    def attend(self, queries: Queries) -> Tensor:
        tokens = self.k.shape[2]
        skipped = tokens - queries.q.shape[2]
        self._check_causal(queries, skipped)
        scratch, outs, done = self.before._fork(), [], 0
        while done < tokens:
            stop = min(tokens, done + scratch._tokens_at_once())
            part = slice(done, stop)
            scratch.append(self.k[:, :, part], self.v[:, :, part], None if done else self.padding)
            rows = slice(max(done - skipped, 0), max(stop - skipped, 0))
            start = scratch._begin(stop - done)
            if rows.stop > rows.start:
                columns = slice(start - self.start, self.past + stop)
                outs.append(queries.part(rows, columns).over_stored(scratch, start))
            done = stop
        return torch.cat(outs, dim=2)

    def _check_causal(self, queries: Queries, skipped: int) -> None:
        sees_newer = queries.mask is None and not queries.causal
        if queries.mask is not None:
            sees_newer = bool(queries.mask[..., self.past :].triu(skipped + 1).any())
        if sees_newer:
            raise NotImplementedError(
                'prefill="stepwise" is causal, but here tokens see newer ones, as those of an image may; use '
                'prefill="exact"'
            )

    def _stored_anew(self, padding: Tensor) -> None:
        self.padding = padding


def _densified(x: Any) -> Any:
    """x with tensors in place of handles."""
    if isinstance(x, Handle):
        return x.dense()
    return type(x)(_densified(item) for item in x) if isinstance(x, (list, tuple)) else x


class Handle:
    """Keys or values of one forward. Looks like a tensor [batch, kv_heads, positions, head_dim].

    Its sizes are free. Anything else makes the dense tensor, once a forward, so that attention functions and models
    that know nothing of handles compute what they should.
    """

    ndim = 4

    def __init__(self, forward: Forward, side: int) -> None:
        self.forward = forward
        self.side = side
        raw = (forward.k, forward.v)[side]
        self.shape = torch.Size((*raw.shape[:2], forward.past + raw.shape[2], raw.shape[3]))
        self.dtype, self.device = raw.dtype, raw.device

    def dense(self) -> Tensor:
        warnings.warn(
            "a TurboQuantCache is being read as dense tensors; to read it compressed, load the model with "
            'attn_implementation="tqattn"',
            stacklevel=2,
        )
        return self.forward.dense()[self.side]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As a tensor's: itself if nothing changes."""
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        same = (wanted.dtype, wanted.device) == (self.dtype, self.device)
        return self if same else self.dense().to(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: _densified(value) for name, value in (kwargs or {}).items()}
        return function(*_densified(args), **kwargs)


def _define_operator(name: str) -> None:
    function = getattr(operator, name)
    setattr(Handle, f"__{name}__", lambda self, other: function(self.dense(), _densified(other)))
    setattr(Handle, f"__r{name}__", lambda self, other: function(other, self.dense()))


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    _define_operator(_name)
