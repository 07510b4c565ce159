"""Ways to hold a cache, and what a model's queries then read in place of their keys and values."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import format as fmt
from ..cache import KVCache
from .peers import PEERS

# "coded": every query reads what has been coded, at all positions: what the format does. "loop": what a decode loop
# sees, in which the newest tokens of a blocked cache are still dense.
View = Literal["coded", "loop"]
VIEWS: tuple[View, ...] = ("coded", "loop")

# Options that a string may give: all of KVCache's arguments but those that the model, the formats or a tensor decide.
_OTHERS = (
    "batch_size",
    "num_kv_heads",
    "head_dim",
    "capacity",
    "k_format",
    "v_format",
    "device",
    "window",
    "k_balance",
)
OPTIONS = tuple(name for name in inspect.signature(KVCache).parameters if name not in _OTHERS)
# Plain TurboQuant, as it was first published: each token as it comes, around zero, at the scale it was quantised at.
PRESETS: dict[str, dict[str, Any]] = {"plain": {"block_size": 0, "encode": "plain", "sink_length": 0}}


class Part(NamedTuple):
    """Neighbouring queries that read the same numbers.

    keys and values, float32 [batch, kv_heads, queries.stop, head_dim], are those of positions 0 to queries.stop - 1;
    within them attention is causal as usual.
    """

    queries: slice
    keys: Tensor
    values: Tensor


# substitute(layer, q, k, v): what that layer's queries read in place of its k, v [B, Hkv, T, D]; q is [B, Hq, T, D].
Substitute = Callable[[int, Tensor, Tensor, Tensor], Sequence[Part]]


class Storage(Protocol):
    """How one layer's keys and values are held."""

    @property
    def has_tail(self) -> bool:
        """Whether the two views differ."""

    @property
    def is_peer(self) -> bool: ...

    def bytes_per_token(self, head_dim: int) -> float:
        """Of one KV head, K and V together; ValueError if there is no such head dim."""

    def parts(self, k: Tensor, v: Tensor, view: View) -> list[Part]:
        """What the queries of k, v [batch, kv_heads, tokens, head_dim] read: parts that cover them all, in order."""


@dataclass(frozen=True)
class Exact:
    """What the model computes, untouched; it takes what a cache in half precision takes."""

    has_tail = False
    is_peer = False

    def bytes_per_token(self, head_dim: int) -> float:
        return fmt.bytes_per_token("f16", "f16", head_dim, 0)

    def parts(self, k: Tensor, v: Tensor, view: View) -> list[Part]:
        return [Part(slice(0, k.shape[2]), k, v)]


@dataclass(frozen=True)
class Compressed:
    """Held in a KVCache; `options` are its keyword arguments."""

    k_format: str
    v_format: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def block(self) -> int:
        dense = self.k_format == self.v_format == "f16"
        return 0 if dense else self.options.get("block_size", fmt.DEFAULT_BLOCK_SIZE)

    @property
    def has_tail(self) -> bool:
        return self.block > 0

    @property
    def is_peer(self) -> bool:
        return self.options.get("encode") == "plain"

    def bytes_per_token(self, head_dim: int) -> float:
        return fmt.bytes_per_token(self.k_format, self.v_format, head_dim, self.block)

    def parts(self, k: Tensor, v: Tensor, view: View) -> list[Part]:
        tokens = k.shape[2]
        coded = self._coded(k, v)
        if view == "coded" or not self.has_tail:
            return [Part(slice(0, tokens), *coded)]
        dense = _held(k, v, "f16", "f16")
        residual: int = self.options.get("residual_length", 0)
        parts: list[Part] = []
        begin = 0
        while begin < tokens:
            boundary = max(0, (begin - residual) // self.block * self.block)
            end = min(tokens, boundary + residual + self.block)
            rows = (
                torch.cat((old[:, :, :boundary], new[:, :, boundary:end]), dim=2)
                for old, new in zip(coded, dense, strict=True)
            )
            parts.append(Part(slice(begin, end), *rows))
            begin = end
        return parts

    def _coded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache holds of k and v once later tokens have had all of them coded."""
        tokens = k.shape[2]
        if self.block:
            later = -tokens % self.block + self.options.get("residual_length", 0) + 1
            k, v = (self._extended(x.float(), later) for x in (k, v))
        k, v = _held(k, v, self.k_format, self.v_format, **self.options)
        return k[:, :, :tokens], v[:, :, :tokens]

    def _extended(self, x: Tensor, later: int) -> Tensor:
        """x with rows added that leave the mean of its last block, to which the sinks do not belong, as it is."""
        last = x.shape[2] - 1
        sinks: int = self.options.get("sink_length", fmt.DEFAULT_SINK_LENGTH)
        begun = x[:, :, max(last // self.block * self.block, min(sinks, last)) :]
        return torch.cat((x, begun.mean(dim=2, keepdim=True).expand(-1, -1, later, -1)), dim=2)


@dataclass(frozen=True)
class PeerPair:
    """Held in another project's formats; each token as it comes."""

    k_format: str
    v_format: str
    has_tail = False
    is_peer = True

    def bytes_per_token(self, head_dim: int) -> float:
        return PEERS[self.k_format].row_bytes(head_dim) + PEERS[self.v_format].row_bytes(head_dim)

    def parts(self, k: Tensor, v: Tensor, view: View) -> list[Part]:
        self.bytes_per_token(k.shape[3])  # checks the head dim
        keys, values = PEERS[self.k_format].keys(k.float()), PEERS[self.v_format].values(v.float())
        return [Part(slice(0, k.shape[2]), keys, values)]


@dataclass(frozen=True)
class Candidate:
    """One way to hold the cache of a whole model: `storage` in every layer but those that `layers` names.

    With no storage, `layers` must name every layer of the model and no other.
    """

    name: str
    storage: Storage | None
    layers: Mapping[int, Storage] = field(default_factory=dict)

    @property
    def storages(self) -> list[Storage]:
        return [*([] if self.storage is None else [self.storage]), *self.layers.values()]

    def layer(self, index: int) -> Storage:
        """How a layer is held; ValueError if the candidate does not say."""
        storage = self.layers.get(index, self.storage)
        if storage is None:
            raise ValueError(f"{self.name} does not say how to hold layer {index}: it is for another model")
        return storage

    @property
    def has_tail(self) -> bool:
        return any(storage.has_tail for storage in self.storages)

    @property
    def is_peer(self) -> bool:
        return all(storage.is_peer for storage in self.storages)

    def bytes_per_token(self, shapes: Mapping[int, tuple[int, int]]) -> float:
        """Of a model whose layers have these KV heads and head dims: {layer: (kv_heads, head_dim)}.

        Raises:
            ValueError: the candidate cannot hold such heads, or is for a model with other layers.
        """
        unknown = sorted(set(self.layers) - set(shapes))
        if unknown:
            raise ValueError(f"{self.name} is for another model: this one has no layer {unknown[0]}")
        return sum(self.bytes_per_layer(i, shape) for i, shape in shapes.items())

    def bytes_per_layer(self, index: int, shape: tuple[int, int]) -> float:
        """Of one token in all KV heads of a layer, `shape` being its (kv_heads, head_dim)."""
        kv_heads, head_dim = shape
        return kv_heads * self.layer(index).bytes_per_token(head_dim)

    def substitute(self, view: View) -> Substitute:
        """What each layer's queries read when the cache is held so, in one of the VIEWS."""
        if view not in VIEWS:
            raise ValueError(f"unknown view {view!r}; choose one of {', '.join(VIEWS)}")
        return lambda layer, q, k, v: self.layer(layer).parts(k, v, view)


def parse(spec: str) -> Candidate:
    """The candidate that a string describes, in every layer: "K/V" or "KV", then ":" and options.

    Examples: "tq8/tq4", "tq4:plain", "tq4/tq3:block_size=64,residual_length=32", "q8_0/q4_0".

    Raises:
        ValueError: an unknown format, option or value; the message names the choices.
    """
    return Candidate(spec, parse_storage(spec))


def per_layer(specs: Sequence[str], name: str) -> Candidate:
    """The candidate that holds layer i of a model with len(specs) layers as specs[i] says."""
    return Candidate(name, None, {i: parse_storage(spec) for i, spec in enumerate(specs)})


def parse_storage(spec: str) -> Storage:
    """How a string says to hold a layer; see `parse`."""
    formats, _, rest = spec.partition(":")
    k_format, slash, v_format = formats.partition("/")
    pair = (k_format, v_format if slash else k_format)
    options: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if not equals and name in PRESETS:
            options.update(PRESETS[name])
        elif equals and name in OPTIONS:
            options[name] = _value(value)
        else:
            choices = ", ".join((*PRESETS, *(f"{option}=..." for option in OPTIONS)))
            raise ValueError(f"unknown option {word!r} in {spec!r}; choose from {choices}")
    for name in pair:
        if name not in fmt.FORMATS and name not in PEERS:
            ours, others = ", ".join(fmt.FORMATS), ", ".join(PEERS)
            raise ValueError(f"unknown format {name!r} in {spec!r}; choose one of {ours}, or to compare {others}")
    if all(name in fmt.FORMATS for name in pair):
        KVCache(1, 1, fmt.HEAD_DIMS[0], 1, *pair, **options)  # a wrong value is reported here
        return Compressed(*pair, options)
    if not all(name in PEERS for name in pair):
        raise ValueError(f"{spec!r} mixes formats of two projects: no cache holds both")
    if options:
        raise ValueError(
            f"{spec!r}: {', '.join(options)} are options of KVCache, which {' and '.join(pair)} do not use"
        )
    return PeerPair(*pair)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _held(k: Tensor, v: Tensor, k_format: str, v_format: str, **options: Any) -> tuple[Tensor, Tensor]:
    """What a cache holds of k, v [batch, kv_heads, tokens, head_dim], float32."""
    if k.shape != v.shape:
        raise ValueError(f"k and v differ in shape, {list(k.shape)} and {list(v.shape)}: a KVCache holds one head dim")
    batch, heads, tokens, head_dim = k.shape
    cache = KVCache(batch, heads, head_dim, tokens, k_format, v_format, k.device, **options)
    cache.append(k, v)
    return cache.dense()
