"""KVCache: a TurboQuant-compressed key-value cache of one attention layer."""

import copy
import operator
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import cache_file
from . import format as fmt
from .cache_config import MAX_WINDOW_QUERIES, CacheConfig
from .reference import to_half


@dataclass
class _Side:
    """Buffers of K or of V; csrc/backend.h gives their shapes."""

    codes: Tensor
    norms: Tensor | None
    means: Tensor | None
    tail: Tensor | None

    @classmethod
    def allocate(cls, config: CacheConfig, storage: fmt.Format, device: torch.device | str | None) -> "_Side":
        lead = (config.batch_size, config.num_kv_heads)
        groups = storage.norms_per_row(config.head_dim)
        width = storage.row_bytes(config.head_dim) if storage.is_coded else config.head_dim
        dtype = torch.uint8 if storage.is_coded else torch.float16
        norm_shape = (*lead, config.slots) if groups == 1 else (*lead, config.slots, groups)
        mean_shape = (*lead, config.slots // config.block, config.head_dim) if config.block else None
        tail_rows = config.sink_rows + config.tail_slots

        def half(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float16, device=device)

        return cls(
            codes=torch.zeros(*lead, config.slots, width, dtype=dtype, device=device),
            norms=torch.zeros(norm_shape, device=device) if groups else None,
            means=half(*mean_shape) if mean_shape and storage.is_coded else None,
            tail=half(*lead, tail_rows, config.head_dim) if tail_rows else None,
        )

    def grow(self, config: CacheConfig, storage: fmt.Format) -> None:
        """Make the buffers those of `config`, which has more slots, one after the other; slot p stays slot p."""
        larger = _Side.allocate(config, storage, "meta").buffers()
        for name, buffer in self.buffers().items():
            if buffer.shape != larger[name].shape:
                grown = torch.zeros_like(larger[name], device=buffer.device)
                grown[:, :, : buffer.shape[2]] = buffer
                setattr(self, name, grown)

    def buffers(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


class KVCache:
    """Keys and values of one attention layer, compressed.

    Tokens are coded in blocks of `block_size` around the mean of their block; the newest ones wait, dense in half
    precision, until a block is full and the next token comes. The first few stay dense for good: trained models attend
    to them more than to any others. Positions are counted from 0 for the first token ever appended; sequences of a
    batch have the same length, those with less to say are padded on the left.

    Args:
        batch_size, num_kv_heads, head_dim: sizes; head_dim is one of format.HEAD_DIMS.
        capacity: tokens the cache can hold. With a window that fits the capacity it is a ring buffer and never full.
        k_format, v_format: storage of keys and values, names in format.FORMATS.
        device: where the buffers are; the default device if None.
        window: tokens that a query sees, its own included; None for all.
        block_size: tokens coded at a time around their mean; 0 codes each token as it comes, without a mean.
        residual_length: the newest tokens that always stay dense.
        encode: "fast" scales a decoded group to its original norm; "best" also searches for its best codes, which
            takes several times as long; "plain" keeps the scale it was quantised at. All are read alike.
        sink_length: the first tokens of each sequence, its padding not counted, that always stay dense. (The `sinks` of
            `attention` are another thing: logits without a token.)
        k_balance: float32 [num_kv_heads, head_dim], positive. Keys are stored times it and queries are divided by it:
            logits stay what they are, but the error of coding is smaller where it is larger. None for ones.

    Raises:
        ValueError: an argument is out of range; the message names what was given and what is supported.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        k_format: str = "tq8",
        v_format: str = "tq4",
        device: torch.device | str | None = None,
        window: int | None = None,
        block_size: int = fmt.DEFAULT_BLOCK_SIZE,
        residual_length: int = 0,
        encode: str = "fast",
        sink_length: int = fmt.DEFAULT_SINK_LENGTH,
        k_balance: Tensor | None = None,
    ) -> None:
        self.config = CacheConfig(
            batch_size,
            num_kv_heads,
            head_dim,
            capacity,
            k_format,
            v_format,
            window,
            block_size,
            residual_length,
            encode,
            sink_length,
        )
        k_side, v_side = self.config.formats
        self._k = _Side.allocate(self.config, k_side, device)
        self._v = _Side.allocate(self.config, v_side, device)
        self.k_balance = None if k_balance is None else self.config.checked_balance(k_balance).to(self.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self._length = 0  # positions appended
        self._coded = 0  # the first position that is in the tail
        self._stored = 0  # the first position whose codes have not been overwritten
        self._first = 0  # the first position that may still be seen
        self._starts: Tensor | None = None  # int32 [batch]: the first token after the padding
        self._most_padding = 0  # the last of the starts, or what it was before `select`

    # What it holds

    def __len__(self) -> int:
        """Positions that it holds for the newest token to see: all that were appended, or the window's."""
        return self._length - self._begin(1)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, used or not."""
        tensors = [*self._k.buffers().values(), *self._v.buffers().values()]
        tensors += [t for t in (self._starts, self.k_balance) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def device(self) -> torch.device:
        return self._k.codes.device

    def __repr__(self) -> str:
        c = self.config
        balanced = "" if self.k_balance is None else "keys balanced, "
        return (
            f"KVCache({c.k_format}/{c.v_format}, {balanced}{len(self)} of {c.capacity} tokens, batch {c.batch_size}, "
            f"{c.num_kv_heads} heads of {c.head_dim}, window {c.window}, {self.nbytes} bytes on {self.device})"
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """What the cache holds, unrotated: k and v, float32 [batch, kv_heads, len(self), head_dim], oldest first.

        Padding comes out as zeros.
        """
        return self._dense(self._begin(1))

    # Writing

    def append(self, k: Tensor, v: Tensor, left_padding: Tensor | Sequence[int] | None = None) -> None:
        """Store new tokens.

        Args:
            k, v: [batch, kv_heads, tokens, head_dim]; float32, float16 or bfloat16, any strides.
            left_padding: with the first tokens: how many positions of each sequence are padding. They may be more than
                these tokens; they are never seen, and in no mean. Later only for sequences that were padding so far.

        Raises:
            ValueError: shapes, types or devices do not fit, or the tokens do not fit the capacity. Nothing is written.
        """
        shape = k.shape
        if len(shape) != 4:
            raise ValueError(f"k must be [batch, kv_heads, tokens, head_dim], got shape {list(shape)}")
        self._check_fit("k", k, shape)
        starts = self._padding_starts(left_padding)
        tokens = shape[2]
        coded_end = self._coded_end(tokens)
        torch.ops.tqattn.encode_kv_(
            self._balanced_keys(k),
            v,
            *self._stores(),
            self._length,
            self._coded,
            coded_end,
            self.config.block,
            self.config.sink_rows,
            starts,
            self.config.encode,
        )
        self._advance(tokens, coded_end, starts)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        left_padding: Tensor | Sequence[int] | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append k, v and attend causally with q, in one operator call: one step of a decode loop, or a prompt.

        Takes what `append` and `attention` take, and returns (out, lse) as `attention` does with return_lse.
        """
        q_shape, k_shape = q.shape, k.shape
        if len(k_shape) != 4 or len(q_shape) != 4 or q_shape[2] != k_shape[2]:
            raise ValueError(
                "q, k and v must be [batch, heads, tokens, head_dim] with as many tokens each, "
                f"got shapes {list(q_shape)} and {list(k_shape)}"
            )
        self._check_fit("q", q, q_shape)
        self._check_fit("k", k, k_shape)
        starts = self._padding_starts(left_padding)
        tokens = k_shape[2]
        coded_end = self._coded_end(tokens)
        begin = self._begin(tokens, self._length + tokens, self._stored_once(coded_end))
        out, lse = torch.ops.tqattn.decode_step_(
            self._balanced_queries(q),
            self._balanced_keys(k),
            v,
            *self._stores(),
            begin,
            self._length,
            self._coded,
            coded_end,
            self.config.block,
            self.config.sink_rows,
            self.config.encode,
            scale,
            softcap,
            self.config.window or 0,
            sinks,
            _three_dimensional(attn_mask),
            starts,
        )
        self._advance(tokens, coded_end, starts)
        return self._as_asked(out, q), lse

    def check_room(self, tokens: int) -> None:
        """ValueError if `tokens` more do not fit."""
        end = self._length + tokens
        if not self.config.is_ring and end - self._first > self.config.capacity:
            raise ValueError(
                f"{tokens} more tokens do not fit: the cache holds {len(self)} of {self.config.capacity}; "
                "crop or reset it, or make it with a larger capacity or a window"
            )

    def _tokens_at_once(self) -> int:
        """How many more tokens can be appended together and then see what each of them would have seen alone."""
        tokens = self.tokens_before_coding()
        return min(tokens, MAX_WINDOW_QUERIES) if self.config.is_ring else tokens

    def tokens_before_coding(self) -> int:
        """How many more tokens see each other dense: appending one more codes a block."""
        if not self.config.block:
            return 1 << 31
        return self.config.block - (self._length - self.config.residual_length) % self.config.block

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all; what is stored stays. A ring buffer is never full, and left as it is.

        Raises:
            ValueError: less than the capacity that it has.
        """
        if capacity < self.config.capacity:
            raise ValueError(f"capacity can only grow: it is {self.config.capacity}, got {capacity}")
        if self.config.is_ring:
            return
        config = replace(self.config, capacity=capacity)
        for side, storage in zip((self._k, self._v), config.formats, strict=True):
            side.grow(config, storage)
        self.config = config

    def crop(self, length: int) -> None:
        """Forget the newest tokens.

        Args:
            length: keep the oldest `length` of the len(self) positions; 0 is `reset`. Negative: forget the newest
                -length tokens, as after rejected speculation; a windowed cache then sees again what its window had
                just left behind.

        Raises:
            ValueError: more than the cache holds, or no integer.
        """
        held = len(self)
        try:
            length = operator.index(length)
        except TypeError:
            raise ValueError(f"length must be an integer from {-held} to {held}, got {length!r}") from None
        if length == 0:
            self.reset()
            return
        if not -held <= length <= held:
            raise ValueError(f"cannot crop to {length}: the cache holds {held} tokens; choose {-held} to {held}")
        end = self._length + length if length < 0 else self._begin(1) + length
        if length >= 0:
            self._first = self._begin(1)
        self._crop_to(end)

    def _crop_to(self, end: int) -> None:
        """Forget the positions from `end` on."""
        if end < self._coded:
            block = self.config.block
            coded = end // block * block if block else end
            if coded < end:  # what is kept of a coded block goes back to the tail; the first tokens are there already
                positions = torch.arange(coded, end, device=self.device)
                slots = self.config.sink_rows + positions % self.config.tail_slots
                is_sink = positions < (0 if self._starts is None else self._starts[:, None]) + self.config.sink_rows
                for side, rows in zip((self._k, self._v), self._decode(coded, end, rotated=True), strict=True):
                    assert side.tail is not None
                    side.tail[:, :, slots] = to_half(rows.where(~is_sink.view(-1, 1, end - coded, 1), 0.0))
            self._coded = coded
        self._length = end

    # The batch

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence index[i] was (beam search). `index` has one entry a sequence."""
        index = self._batch_index(index)
        if len(index) != self.config.batch_size:
            raise ValueError(
                f"reorder needs an index for each of {self.config.batch_size} sequences, got {len(index)}; "
                "use select to change the batch size"
            )
        self._take(index)

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep the sequences `index`, in that order and as often as they are named: the batch size may change."""
        index = self._batch_index(index)
        self._take(index)
        self.config = CacheConfig(**{**asdict(self.config), "batch_size": len(index)})

    def to(self, device: torch.device | str) -> "KVCache":
        """Move all buffers to `device`, and return the cache itself: it is moved and not copied.

        Raises:
            ValueError: `device` is something else, such as a dtype: the format says what type each buffer has.
        """
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError):
            raise ValueError(f'a cache is moved to a device, such as "cpu" or "mps", got {device!r}') from None
        for side in (self._k, self._v):
            for name, buffer in side.buffers().items():
                setattr(side, name, buffer.to(device))
        self._starts = None if self._starts is None else self._starts.to(device)
        self.k_balance = None if self.k_balance is None else self.k_balance.to(device)
        return self

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Contents and configuration, for load_state_dict. Tensors are copies of the rows in use."""
        counters = {"length": self._length, "coded": self._coded, "stored": self._stored, "first": self._first}
        state: dict[str, Any] = {"version": fmt.FORMAT_VERSION, "config": asdict(self.config), "counters": counters}
        tensors = {}
        for name, buffer in self._named_buffers().items():
            tensors[name] = buffer.index_select(2, self._rows_in_use(name))
            if name.endswith("tail") and self._starts is not None:
                # A padded sequence may have fewer sinks than others. What a crop has forgotten there is not kept.
                row = torch.arange(min(self.config.sink_rows, self._length), device=self.device)
                is_unused = row >= self._length - self._starts[:, None]
                tensors[name][:, :, : len(row)].masked_fill_(is_unused[:, None, :, None], 0.0)
        if self._starts is not None:
            tensors["starts"] = self._starts.clone()
        if self.k_balance is not None:
            tensors["k_balance"] = self.k_balance.clone()
        return {**state, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned, from a cache of the same configuration on any device.

        Raises:
            ValueError: no such state, another version or configuration, or tensors that do not fit it. The cache is
                left as it was.
        """
        missing = [name for name in ("version", "config", "counters", "tensors") if name not in state]
        if missing:
            raise ValueError(f"the state has no {', '.join(missing)}: pass what KVCache.state_dict returned")
        if state["version"] != fmt.FORMAT_VERSION:
            raise ValueError(f"the state has format version {state['version']}, supported is {fmt.FORMAT_VERSION}")
        if state["config"] != asdict(self.config):
            raise ValueError(f"the state is of a cache with {state['config']}, but this one has {asdict(self.config)}")
        fresh = KVCache(**state["config"], device=self.device)
        fresh._fill(state)
        self.__dict__.update(fresh.__dict__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file whose header states version, configuration and checksums."""
        cache_file.write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> "KVCache":
        """Read a cache that `save` wrote, on any device, onto `device`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not such a cache, of another version, or damaged.
        """
        try:
            state = cache_file.read_state(path)
            cache = cls(**asdict(CacheConfig(**state["config"])), device=device)
            cache._fill(state)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a readable torch_tqattn cache: {error}") from error
        return cache

    # Inside

    def _check_fit(self, name: str, x: Tensor, shape: torch.Size) -> None:
        """ValueError if x, "q" or "k" of four dimensions, is not of this cache's sizes or not on its device.

        The operators compare their arguments with the stores. This does so first, in the words of who has a cache. A
        shape is made anew each time that a tensor is asked for it, so it is passed along.
        """
        batch, heads, _, head_dim = shape
        c = self.config
        heads_fit = heads == c.num_kv_heads if name == "k" else heads % c.num_kv_heads == 0
        if batch != c.batch_size or not heads_fit or head_dim != c.head_dim or x.device != self._k.codes.device:
            raise ValueError(self._misfit(name, x, heads_fit))

    def _misfit(self, name: str, x: Tensor, heads_fit: bool) -> str:
        """What is wrong with x."""
        batch, heads, _, head_dim = x.shape
        c = self.config
        if head_dim != c.head_dim:
            return f"{name} has head_dim {head_dim}, the cache has {c.head_dim}; got shape {list(x.shape)}"
        if not heads_fit:
            wanted = "as many" if name == "k" else "a multiple of that"
            return f"{name} has {heads} heads, the cache has {c.num_kv_heads} KV heads and needs {wanted}"
        if batch != c.batch_size:
            return f"{name} has a batch of {batch}, the cache has one of {c.batch_size}; `select` changes it"
        return f"{name} is on {x.device}, the cache is on {self.device}; move either with .to(device)"

    def _view(self) -> "KVCache":
        """This cache as it is now, without a copy: to be read until this one is written again."""
        view = copy.copy(self)
        view._k, view._v = replace(self._k), replace(self._v)
        return view

    def _fork(self) -> "KVCache":
        """This cache as it is now, to be read also when this one goes on.

        Both may go on, but with the same tokens: they share the codes, unless a ring buffer would overwrite them.
        """
        fork = self._view()
        for side in (fork._k, fork._v):
            for name, buffer in side.buffers().items():
                if name == "tail" or self.config.is_ring:
                    setattr(side, name, buffer.clone())
        return fork

    def _become(self, other: "KVCache") -> None:
        """Hold what `other` holds, on this cache's device; `other` stays as it is."""
        device = self.device
        self.__dict__.update(other._fork().__dict__)
        self.to(device)

    def _attend(
        self,
        q: Tensor,
        start: int,
        *,
        scale: float | None,
        softcap: float,
        sinks: Tensor | None = None,
        mask: Tensor | None = None,
        window: int = 0,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """torch.ops.tqattn.attend over positions from `start` on; mask may have four dimensions."""
        out, lse = torch.ops.tqattn.attend(
            self._balanced_queries(q),
            *self._stores(),
            start,
            self._coded,
            self._length,
            self.config.block,
            self.config.sink_rows,
            scale,
            softcap,
            window,
            sinks,
            _three_dimensional(mask),
            self._starts,
            None,  # lengths: the sequences of a batch are of one length here
            causal,
        )
        return self._as_asked(out, q), lse

    def _stores(self) -> tuple[Any, ...]:
        """The operators' arguments from k_codes to v_format.

        The operators of a decode step get all arguments by position, in the order of csrc/schema.cpp. With names a call
        costs a third more before anything is computed.
        """
        k, v = self._k, self._v
        tensors = (k.codes, k.norms, k.means, k.tail, v.codes, v.norms, v.means, v.tail)
        return (*tensors, self.config.k_format, self.config.v_format)

    def _named_buffers(self) -> dict[str, Tensor]:
        return {f"{side}_{name}": b for side in "kv" for name, b in getattr(self, f"_{side}").buffers().items()}

    def _begin(self, queries: int, length: int | None = None, stored: int | None = None) -> int:
        """The first position that the newest `queries` tokens of `length` see; ValueError if it is gone."""
        length = self._length if length is None else length
        if self.config.window is None:
            return self._first
        begin = max(self._first, length - queries - self.config.window + 1)
        stored = self._stored if stored is None else stored
        if begin < stored and queries > 1:
            raise ValueError(
                f"{queries} query tokens see positions from {begin} on, but a cache with window {self.config.window} "
                f"holds only those from {stored} on; append and attend at most {MAX_WINDOW_QUERIES} tokens at a time"
            )
        return max(begin, stored)

    def _coded_end(self, tokens: int) -> int:
        """The first position in the tail once `tokens` more have come; ValueError if they do not fit."""
        self.check_room(tokens)
        end = self._length + tokens
        return max(self._coded, self._coded_at(end)) if self.config.block else end

    def _coded_at(self, length: int) -> int:
        """The first position in the tail of a cache with blocks that has grown to `length`."""
        # A full block is coded when the next token comes: until then its own tokens see each other dense.
        return max(length - 1 - self.config.residual_length, 0) // self.config.block * self.config.block

    def _stored_once(self, coded_end: int) -> int:
        """The first position whose codes are left once those up to `coded_end` have been written into the ring."""
        return max(self._stored, coded_end - self.config.slots)

    def _advance(self, tokens: int, coded_end: int, starts: Tensor | None) -> None:
        self._length += tokens
        self._coded = coded_end
        self._stored = self._stored_once(coded_end)
        if starts is not self._starts:
            self._set_starts(starts)

    def _set_starts(self, starts: Tensor | None) -> None:
        self._starts = starts
        self._most_padding = 0 if starts is None else int(starts.max())

    def _padding_starts(self, left_padding: Tensor | Sequence[int] | None) -> Tensor | None:
        if left_padding is None:
            return self._starts
        padding = torch.as_tensor(left_padding)
        is_count = padding.shape == (self.config.batch_size,) and not padding.is_floating_point()
        if not is_count or padding.min() < 0 or int(padding.max()) >= 2**31:
            raise ValueError(
                f"left_padding must be {self.config.batch_size} counts, one a sequence, below 2^31, got {padding}"
            )
        known = torch.zeros_like(padding) if self._starts is None else self._starts.to(padding.device)
        if not ((padding == known) | (torch.minimum(padding, known) >= self._length)).all():
            raise ValueError(
                f"left_padding comes with the first tokens, but the cache holds {self._length} already; "
                f"known was {known}, got {padding}"
            )
        return padding.to(device=self.device, dtype=torch.int32) if padding.any() else None

    def _dense(self, begin: int) -> tuple[Tensor, Tensor]:
        """`dense`, of the positions from `begin` on."""
        k, v = self._decode(begin, rotated=False)
        return k if self.k_balance is None else k / self.k_balance[:, None], v

    def _decode(self, begin: int, end: int | None = None, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """Rows of positions begin..end (to the newest if None), [batch, kv_heads, end - begin, head_dim]."""
        end = self._length if end is None else end
        coded = self._coded if self.config.block else end
        k, v = torch.ops.tqattn.decode_kv(
            *self._stores(),
            head_dim=self.config.head_dim,
            start=begin,
            coded=coded,
            length=max(coded, end),  # whole blocks, of which the rows asked for are the first
            block_size=self.config.block,
            sink_length=self.config.sink_rows,
            starts=self._starts,
            rotated=rotated,
        )
        return k[:, :, : end - begin], v[:, :, : end - begin]

    def _batch_index(self, index: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(index)
        size = self.config.batch_size
        numbers = index.dim() == 1 and len(index) > 0 and not index.is_floating_point() and index.dtype != torch.bool
        if not numbers or index.min() < 0 or index.max() >= size:
            raise ValueError(f"the index must name sequences 0 to {size - 1}, got {index}")
        return index.to(device=self.device, dtype=torch.int64)

    def _take(self, index: Tensor) -> None:
        for side in (self._k, self._v):
            for name, buffer in side.buffers().items():
                setattr(side, name, buffer.index_select(0, index))
        if self._starts is not None:
            self._starts = self._starts.index_select(0, index)

    def _rows_in_use(self, name: str) -> Tensor:
        """Slots of a buffer that hold something; those of the tail's ring oldest first."""
        if name.endswith("tail"):
            sinks = torch.arange(min(self.config.sink_rows, self._length), device=self.device)
            waiting = torch.arange(self._coded, self._length, device=self.device) % max(self.config.tail_slots, 1)
            return torch.cat([sinks, self.config.sink_rows + waiting])
        used = min(self._coded, self.config.slots)
        return torch.arange(used // self.config.block if name.endswith("means") else used, device=self.device)

    def _counters_fit(self) -> bool:
        c = self.config
        if not (0 <= self._stored <= self._coded <= self._length and 0 <= self._first <= self._length):
            return False
        if not c.is_ring and (self._length > c.capacity or self._first or self._stored):
            return False
        waiting = self._length - self._coded
        in_blocks = c.block and self._coded % c.block == self._stored % c.block == 0 and waiting <= c.tail_slots
        return self._coded - self._stored <= c.slots and (in_blocks or waiting == 0)

    def _fill(self, state: dict[str, Any]) -> None:
        """Take contents over into this new cache; ValueError if they do not fit it."""
        counters = state["counters"]
        names = ("length", "coded", "stored", "first")
        if not set(names) <= set(counters):
            raise ValueError(f"it has counters {sorted(counters)}, expected {sorted(names)}")
        self._length, self._coded, self._stored, self._first = (counters[name] for name in names)
        if not all(isinstance(counters[name], int) for name in names) or not self._counters_fit():
            raise ValueError(f"the counters contradict each other or the configuration: {counters}")
        tensors = dict(state["tensors"])
        starts = tensors.pop("starts", None)
        balance = tensors.pop("k_balance", None)
        buffers = self._named_buffers()
        if set(tensors) != set(buffers):
            raise ValueError(f"it has tensors {sorted(tensors)}, expected {sorted(buffers)}")
        for name, buffer in buffers.items():
            rows = self._rows_in_use(name)
            shape = [*buffer.shape[:2], len(rows), *buffer.shape[3:]]
            if list(tensors[name].shape) != shape or tensors[name].dtype != buffer.dtype:
                raise ValueError(
                    f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, expected {buffer.dtype} {shape}"
                )
            buffer.index_copy_(2, rows, tensors[name].to(self.device))
        if starts is not None:
            if starts.shape != (self.config.batch_size,) or starts.dtype != torch.int32:
                raise ValueError(f"starts is {starts.dtype} {list(starts.shape)}, expected int32 [batch]")
            self._set_starts(starts.to(self.device))
        if balance is not None:
            self.k_balance = self.config.checked_balance(balance).to(self.device)

    # Balanced keys

    def _can_balance(self, x: Tensor) -> bool:
        """Whether x may be multiplied; if not, the operator that gets it as it is says what is wrong."""
        assert self.k_balance is not None
        return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.device == self.k_balance.device

    def _balanced_keys(self, k: Tensor) -> Tensor:
        if self.k_balance is None or not self._can_balance(k) or k.shape[1::2] != self.k_balance.shape:
            return k
        return k.float() * self.k_balance[:, None]

    def _balanced_queries(self, q: Tensor) -> Tensor:
        if self.k_balance is None or not self._can_balance(q):
            return q
        heads, head_dim = self.k_balance.shape
        if q.shape[3] != head_dim or q.shape[1] % heads:
            return q
        return (q.float().unflatten(1, (heads, -1)) / self.k_balance[:, None, None]).flatten(1, 2)

    def _as_asked(self, out: Tensor, q: Tensor) -> Tensor:
        """What attending with q gave, in q's type: balanced queries are float32."""
        return out if self.k_balance is None else out.to(q.dtype)


def _three_dimensional(mask: Tensor | None) -> Tensor | None:
    """A mask [batch, tokens, positions] from that or from [batch, 1, tokens, positions]."""
    if mask is not None and mask.dim() == 4 and mask.shape[1] == 1:
        return mask[:, 0]
    return mask
