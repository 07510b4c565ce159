"""TurboQuantCache: what `generate` takes as past_key_values, and its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ... import format as fmt
from ...cache import KVCache
from ...cache_config import MAX_WINDOW_QUERIES, CacheConfig
from ...fidelity import Plan
from .forward import Exact, Forward, Handle, Stepwise, Stored

PREFILLS = ("exact", "stepwise")
BITS = {**{bits: f"tq{bits}" for bits in (2, 3, 4, 5, 6, 8)}, 16: "f16"}
# A full layer's room grows by this share, so that a token is copied a few times at most; in units of so many tokens.
GROWTH = 8
ROOM_UNIT = 256


@dataclass
class _Undo:
    """The cache before its newest block was coded, and the tokens since."""

    before: KVCache
    k: Tensor
    v: Tensor

    def reaches(self, end: int, cache: KVCache) -> bool:
        """Whether it knows exactly what `cache` was when it ended at `end`."""
        knows_padding = self.before._length == 0 or self.before._starts is cache._starts
        return knows_padding and end >= self.before._coded


class TurboQuantLayer(CacheLayerMixin):
    """One layer of a `TurboQuantCache`.

    Args:
        options: keyword arguments of KVCache, without sizes, device and window.
        sliding_window: tokens that a query sees, its own included; None for all.
        prefill, max_cache_len: as for `TurboQuantCache`.
    """

    is_croppable = True

    def __init__(
        self,
        options: dict[str, Any],
        sliding_window: int | None,
        prefill: str,
        max_cache_len: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None  # room that grows would be compiled again
        self.sliding_window = sliding_window
        self.prefill = prefill
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.cache: KVCache | None = None
        self._undo: _Undo | None = None

    # What is stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self.max_cache_len or 1  # grows
        window = self.sliding_window
        self.cache = KVCache(batch, heads, head_dim, capacity, device=self.device, window=window, **self.options)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens [batch, kv_heads, tokens, head_dim]; return handles of what these tokens may see."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise NotImplementedError(
                "a compressed cache has no gradients: call under torch.no_grad(), or with use_cache=False to train"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        cache = self._with_room(tokens)
        kind = self._kind(cache, tokens)
        may_be_padding = cache._length <= cache._most_padding
        before = cache._fork() if kind is not Stored or may_be_padding else None
        self._append(cache, key_states, value_states)
        forward = kind(cache, key_states, value_states, before)
        return Handle(forward, 0), Handle(forward, 1)

    def _with_room(self, tokens: int) -> KVCache:
        """The cache, with room for so many tokens more."""
        cache = self.cache
        assert cache is not None
        config, needed = cache.config, cache._length + tokens
        if not config.is_ring and needed > config.capacity:
            if self.max_cache_len is not None:
                raise ValueError(
                    f"{tokens} more tokens do not fit: the cache holds {cache._length} of max_cache_len "
                    f"{self.max_cache_len}; reset or crop it, or make a TurboQuantCache with a larger max_cache_len, "
                    "or without one: its room then grows"
                )
            capacity = max(needed, config.capacity + config.capacity // GROWTH)
            capacity = -(-capacity // ROOM_UNIT) * ROOM_UNIT
            if config.window is not None and capacity >= config.window:
                capacity = max(config.window, config.capacity)  # a ring buffer from now on
            cache.grow(capacity)
        return cache

    def _kind(self, cache: KVCache, tokens: int) -> type[Forward]:
        """How so many new tokens see the cache."""
        if tokens == 1:
            return Stored
        if self.prefill == "exact":
            return Exact
        return Stored if tokens <= cache._tokens_at_once() else Stepwise

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions the next `query_length` tokens may see, theirs included, and the first of them."""
        start = 0 if self.cache is None else self.cache._begin(0)
        return self.get_seq_length() - start + query_length, start

    def get_max_length(self) -> int:
        return min((n for n in (self.sliding_window, self.max_cache_len) if n is not None), default=-1)

    @property
    def keys(self) -> Tensor | None:
        """What the cache holds for the next token, dense, in the model's dtype; for whoever looks into a layer."""
        return self._dense(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None: ...  # the base class sets both to None

    @property
    def values(self) -> Tensor | None:
        return self._dense(1)

    @values.setter
    def values(self, values: Tensor | None) -> None: ...

    def _dense(self, side: int) -> Tensor | None:
        return None if self.cache is None else self.cache._dense(self.cache._begin(0))[side].to(self.dtype)

    # Taking back

    def activate_past_recording(self) -> None:
        """From now on, `crop` takes back the newest forward exactly, as if it had never been."""
        self.record_past = True

    def _append(self, cache: KVCache, k: Tensor, v: Tensor, left_padding: Tensor | None = None) -> None:
        """Append tokens; while the past is recorded, keep what `crop` needs to take back the newest of them."""
        older = k.shape[2] - MAX_WINDOW_QUERIES
        if self.record_past and older > 0:
            cache.append(k[:, :, :older], v[:, :, :older])
            k, v = k[:, :, older:], v[:, :, older:]
        # As long as no block is coded, tokens are taken back without help.
        if self.record_past and cache.config.block and cache._coded_end(k.shape[2]) > cache._coded:
            self._undo = _Undo(cache._fork(), k.clone(), v.clone())
        elif self._undo is not None:
            undo = self._undo
            self._undo = _Undo(undo.before, torch.cat([undo.k, k], dim=2), torch.cat([undo.v, v], dim=2))
        cache.append(k, v, left_padding)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens.

        What then remains of a block that was coded is dense again, with the errors that coding made; but after
        `activate_past_recording`, the newest forward's tokens, up to 128 of them, leave no trace at all.

        Raises:
            ValueError: a positive number.
            RuntimeError: a sliding layer no longer holds what the window would then show.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        cache, undo = self.cache, self._undo
        if cache is None or not tokens_to_remove:
            return
        self._undo = None
        end = cache._length + tokens_to_remove
        if end <= 0:
            cache.reset()
        elif undo is not None and cache._coded_at(end) < cache._coded and undo.reaches(end, cache):
            self._take_back(undo, end)
        else:
            if cache.config.window is not None and max(end - cache.config.window + 1, cache._first) < cache._stored:
                raise RuntimeError(
                    f"cannot take back {-tokens_to_remove} tokens: a sliding layer with a window of "
                    f"{cache.config.window} keeps {MAX_WINDOW_QUERIES - 1} positions more; take back fewer at a time"
                )
            cache._crop_to(end)
            if undo is not None and end >= undo.before._length:
                kept = end - undo.before._length
                self._undo = _Undo(undo.before, undo.k[:, :, :kept], undo.v[:, :, :kept])

    def _take_back(self, undo: _Undo, end: int) -> None:
        """Become what the cache was before its newest block was coded, and what came after that up to `end`."""
        assert self.cache is not None
        device, starts = self.cache.device, self.cache._starts
        self.cache = undo.before
        self.cache.to(device)
        kept = end - undo.before._length
        if kept > 0:
            k, v = undo.k[:, :, :kept].to(device), undo.v[:, :, :kept].to(device)
            self._append(self._with_room(kept), k, v, None if undo.before._length else starts)
        else:
            self.cache._crop_to(end)

    def reset(self) -> None:
        self.cache, self._undo, self.is_initialized = None, None, False

    # The batch, and where it is

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self._select(torch.arange(self.cache.config.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """`indices` are whatever selects rows of a tensor: numbers, negative ones too, one bool a sequence, a slice."""
        if self.cache is not None:
            rows = indices.cpu() if isinstance(indices, Tensor) else indices
            self._select(torch.arange(self.cache.config.batch_size)[rows, ...])

    def _select(self, index: Tensor) -> None:
        self._undo = None
        if self.cache is not None:
            self.cache.select(index)

    def offload(self) -> None:
        if self.cache is not None:
            self.cache.to("cpu")

    def prefetch(self) -> None:
        if self.cache is not None:
            self.cache.to(self.device)


@dataclass(frozen=True)
class LayerReport:
    """One layer of `TurboQuantCache.report`.

    layer: its index.
    kind: "full", "sliding", or the name of the stock layer that was left in place.
    format: storage of keys/values, "not compressed", or the head dims that cannot be.
    tokens: positions held, those of the window in a sliding layer.
    nbytes: bytes of all buffers, used or not.
    dense_nbytes: bytes that the stock layer would hold.
    """

    layer: int
    kind: str
    format: str
    tokens: int
    nbytes: int
    dense_nbytes: int

    @property
    def ratio(self) -> float:
        """nbytes over dense_nbytes; 1 if there is nothing."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    def __str__(self) -> str:
        return (
            f"{self.layer:3} {self.kind:9} {self.format:12} {self.tokens:7} tokens {self.nbytes:12} bytes "
            f"{self.dense_nbytes:12} dense {self.ratio:7.1%}"
        )


class TurboQuantCache(DynamicCache):
    """A cache for `generate` or a model's forward whose attention layers are compressed.

    The model should be loaded with attn_implementation="tqattn", which reads the compressed cache; any other
    implementation works too, and makes dense tensors of a layer each time. Layers that cannot be compressed are left
    as transformers has them: linear attention, other kinds of caches, unsupported head dims; `report` says which.

    Args:
        config: the model's.
        k_format, v_format: storage of keys and values, names in torch_tqattn.FORMATS.
        residual_length: the newest tokens that always stay dense.
        quantize_sliding: False leaves the layers with a sliding window dense.
        skip_layers: layers to leave dense, negative ones counted from the last.
        nbits, nbits_key, nbits_value: bits a number in place of the formats: 2, 3, 4, 5, 6, 8, or 16 for "f16".
            nbits_key and nbits_value go before nbits.
        block_size, sink_length, encode: as for KVCache.
        prefill: "exact": the tokens of one call see each other exactly, and the past compressed. "stepwise": every
            token sees what it would see if tokens had come one by one, so that neither chunked prefill nor assisted
            decoding changes the result. That holds with attn_implementation="tqattn".
        plan: what torch_tqattn.plan found for the model; it goes before the arguments above, layer by layer.
        max_cache_len: make room for so many tokens once and for all: then `generate` may compile the model. None: room
            grows with the text, which that of dense layers does in any case.
        offloading, offload_only_non_sliding: as for DynamicCache.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        k_format: str = "tq8",
        v_format: str = "tq4",
        residual_length: int = 0,
        quantize_sliding: bool = True,
        skip_layers: Sequence[int] = (),
        *,
        nbits: int | None = None,
        nbits_key: int | None = None,
        nbits_value: int | None = None,
        block_size: int = fmt.DEFAULT_BLOCK_SIZE,
        sink_length: int = fmt.DEFAULT_SINK_LENGTH,
        encode: str = "fast",
        prefill: str = "exact",
        plan: Plan | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        if prefill not in PREFILLS:
            raise ValueError(f"unknown prefill {prefill!r}; choose one of {', '.join(PREFILLS)}")
        self.max_cache_len = max_cache_len
        options: dict[str, Any] = {
            "k_format": _format_of(nbits if nbits_key is None else nbits_key, k_format),
            "v_format": _format_of(nbits if nbits_value is None else nbits_value, v_format),
            "residual_length": residual_length,
            "block_size": block_size,
            "sink_length": sink_length,
            "encode": encode,
        }
        CacheConfig(1, 1, fmt.HEAD_DIMS[0], 1, window=None, **options)  # a wrong argument is reported here
        count = len(self.layers)
        if not all(-count <= layer < count for layer in skip_layers):
            raise ValueError(f"skip_layers must name layers {-count} to {count - 1}, got {list(skip_layers)}")
        skipped = {layer % count for layer in skip_layers}
        self._head_dims: dict[int, str] = {}  # of layers that had to be left dense
        for i, layer in enumerate(self.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                continue  # classes derived from these hold more than keys and values
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            if i not in skipped and (window is None or quantize_sliding):
                own = {**options, **(plan.layers.get(i, {}) if plan else {})}
                self.layers[i] = TurboQuantLayer(own, window, prefill, max_cache_len)
            else:
                self.layers[i] = self._dense_layer(window)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store a layer's new tokens [batch, kv_heads, tokens, head_dim]; return handles of what these may see."""
        layer = self.layers[layer_idx]
        if isinstance(layer, TurboQuantLayer) and not layer.is_initialized:
            self._leave_dense_if_it_must(layer_idx, layer, key_states.shape[3], value_states.shape[3])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make every layer's buffers now, which its first `update` would do."""
        head_dims = head_dim if isinstance(head_dim, list) else [head_dim] * len(self.layers)
        for i, (layer, dim) in enumerate(zip(self.layers, head_dims, strict=True)):
            if isinstance(layer, TurboQuantLayer) and not layer.is_initialized:
                self._leave_dense_if_it_must(i, layer, dim, dim)
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)

    def _leave_dense_if_it_must(self, i: int, layer: TurboQuantLayer, k_dim: int, v_dim: int) -> None:
        if k_dim == v_dim and k_dim in fmt.HEAD_DIMS:
            return
        self._head_dims[i] = f"head_dim {k_dim}" if k_dim == v_dim else f"head dims {k_dim}/{v_dim}"
        stock = self._dense_layer(layer.sliding_window)
        if isinstance(stock, DynamicSlidingWindowLayer):
            stock.record_past = layer.record_past
        self.layers[i] = stock

    def _dense_layer(self, window: int | None) -> DynamicLayer:
        """The stock layer that shows the positions which a TurboQuantLayer would: a model makes one mask for all."""
        layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
        layer.is_compileable = self.max_cache_len is not None
        return layer

    def report(self) -> list[LayerReport]:
        """What each layer holds, and what it would hold dense. `print(*cache.report(), sep="\n")` makes a table."""
        return [self._report(i, layer) for i, layer in enumerate(self.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' buffers, used or not."""
        return sum(row.nbytes for row in self.report())

    def _report(self, i: int, layer: Any) -> LayerReport:
        if not isinstance(layer, TurboQuantLayer):
            nbytes = _nbytes(vars(layer))
            keys = getattr(layer, "keys", None)
            held = keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0
            tokens = min(held, int(layer.get_seq_length())) if held else 0
            return LayerReport(
                i, type(layer).__name__, self._head_dims.get(i, "not compressed"), tokens, nbytes, nbytes
            )
        kind = "sliding" if layer.is_sliding else "full"
        names = f"{layer.options['k_format']}/{layer.options['v_format']}"
        if layer.cache is None:
            return LayerReport(i, kind, names, 0, 0, 0)
        config = layer.cache.config
        tokens = layer.get_mask_sizes(0)[0]
        numbers = 2 * config.batch_size * config.num_kv_heads * tokens * config.head_dim
        return LayerReport(i, kind, names, tokens, layer.cache.nbytes, numbers * layer.dtype.itemsize)


def _format_of(nbits: int | None, name: str) -> str:
    if nbits is not None and nbits not in BITS:
        raise ValueError(f"nbits must be one of {', '.join(map(str, BITS))}, got {nbits}")
    return name if nbits is None else BITS[nbits]


def _nbytes(x: Any) -> int:
    """Bytes of all tensors in a structure of dicts and lists."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return sum(_nbytes(item) for item in items)
