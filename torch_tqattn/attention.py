"""Attention over a compressed cache: a function, and a module that owns its cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import format as fmt
from .cache import KVCache
from .cache_config import CacheConfig, is_integer


@overload
def attention(
    q: Tensor,
    cache: KVCache,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    causal: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    cache: KVCache,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    causal: bool = ...,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    cache: KVCache,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest tokens' queries over what the cache holds, computed from its codes.

    Args:
        q: [batch, heads, tokens, head_dim], float32, float16 or bfloat16; query i belongs to the cache's position
            length - tokens + i. Query heads are grouped over KV heads: head h uses KV head h // (heads / kv_heads).
        cache: the cache, the queries' own tokens already appended.
        scale: factor of the logits; 1 / sqrt(head_dim) if None.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.
        sinks: [heads], a logit for each head that takes weight but has no value.
        attn_mask: bool [1 or batch, (1,) 1 or tokens, positions], True where a query may look. The positions are
            len(cache), or with a window all that any of these queries may see: window - 1 before the first of them.
        causal: query i sees nothing newer than its own position; False lets every query see everything.
        return_lse: also return the log-sum-exp of each query's logits, its sink included.

    Returns:
        out [batch, heads, tokens, head_dim] in q's dtype; with return_lse also lse [batch, heads, tokens], float32. A
        query that sees nothing gets zeros, and an lse of -inf without a sink.

    Raises:
        ValueError: arguments that do not fit each other, or more queries than the cache has tokens for.
    """
    shape = q.shape
    if len(shape) != 4:
        raise ValueError(f"q must be [batch, heads, tokens, head_dim], got shape {list(shape)}")
    cache._check_fit("q", q, shape)
    if causal and shape[2] > cache._length - cache._first:
        raise ValueError(
            f"q has {shape[2]} tokens but the cache holds {len(cache)}: queries belong to the cache's newest tokens, "
            "append their keys and values first"
        )
    out, lse = cache._attend(
        q,
        cache._begin(shape[2]),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        mask=attn_mask,
        window=cache.config.window or 0,
        causal=causal,
    )
    return (out, lse) if return_lse else out


class TQAttention(nn.Module):
    """Causal attention that keeps its keys and values compressed; one for each layer of a model.

    Rotation, cache and masking are inside: `forward` takes and returns ordinary tensors. `cache` is None until the
    first call, which allocates it with its batch size and device; `.to(device)` of the module moves it.

    What the cache holds is no weight, so the module adds nothing to a model's state_dict. `attn.cache.save(path)` keeps
    it, and `attn.cache = KVCache.load(path)` brings it back.

    Args:
        num_heads, num_kv_heads, head_dim: the layer's sizes.
        max_seq_len: tokens that the cache can hold.
        k_format, v_format, window, block_size, residual_length, encode, sink_length, k_balance: as for KVCache.
        scale, softcap: as for `attention`.

    Raises:
        ValueError: an argument is out of range.
    """

    cache: KVCache | None

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_seq_len: int,
        k_format: str = "tq8",
        v_format: str = "tq4",
        *,
        window: int | None = None,
        block_size: int = fmt.DEFAULT_BLOCK_SIZE,
        residual_length: int = 0,
        encode: str = "fast",
        sink_length: int = fmt.DEFAULT_SINK_LENGTH,
        k_balance: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        # A wrong argument is reported here, not at the first token.
        config = CacheConfig(
            1,
            num_kv_heads,
            head_dim,
            max_seq_len,
            k_format,
            v_format,
            window,
            block_size,
            residual_length,
            encode,
            sink_length,
        )
        if not is_integer(num_heads) or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads!r} must be a positive multiple of num_kv_heads {num_kv_heads}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale must be None (1 / sqrt(head_dim)) or finite, got {scale}")
        if not math.isfinite(softcap) or softcap < 0:
            raise ValueError(f"softcap must be 0 (none) or a positive number, got {softcap}")
        self._config = config
        self._k_balance = None if k_balance is None else config.checked_balance(k_balance)
        self.num_heads = num_heads
        self.scale = scale
        self.softcap = softcap
        self.cache = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        sinks: Tensor | None = None,
        left_padding: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Append k and v, then attend causally with q: a prompt, or one token.

        The result does not depend on how a prompt is cut into calls: a query sees its own block dense, and codes where
        it would when tokens come one by one.

        Args:
            q: [batch, num_heads, tokens, head_dim].
            k, v: [batch, num_kv_heads, tokens, head_dim].
            attn_mask, sinks: as for `attention`.
            left_padding: with the first tokens only, as for KVCache.append.

        Returns:
            [batch, num_heads, tokens, head_dim] in q's dtype.

        Raises:
            ValueError: shapes that do not fit, or no room left; then nothing is written.
        """
        if torch.compiler.is_compiling():
            # The numbers of anything that hangs on a module are constants to the compiler, and the cache's length would
            # be compiled anew for each token. Within this call they are numbers like others.
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                return self._forward(q, k, v, attn_mask, sinks, left_padding)
        return self._forward(q, k, v, attn_mask, sinks, left_padding)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        left_padding: Tensor | Sequence[int] | None,
    ) -> Tensor:
        q_shape, k_shape = q.shape, k.shape
        if len(q_shape) != 4 or q_shape[1] != self.num_heads:
            raise ValueError(
                f"q must be [batch, {self.num_heads}, tokens, {self._config.head_dim}], got shape {list(q_shape)}"
            )
        if len(k_shape) != 4 or k_shape != v.shape or k_shape[2] != q_shape[2]:
            raise ValueError(
                f"k and v must be [batch, {self._config.num_kv_heads}, tokens, {self._config.head_dim}] with as many "
                f"tokens as q, got shapes {list(k_shape)}, {list(v.shape)} and q {list(q_shape)}"
            )
        cache = self.cache
        if cache is None:
            cache = self._allocate(q_shape[0], q.device)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": sinks}
        if q_shape[2] <= cache._tokens_at_once():
            out, _ = cache.step(q, k, v, attn_mask=attn_mask, left_padding=left_padding, **options)
        else:
            out = self._in_parts(cache, q, k, v, attn_mask, left_padding, options)
        if self.cache is None:
            self.cache = cache  # a first call that failed leaves no cache behind
        return out

    def reset(self) -> None:
        """Forget all tokens, and the batch size with them."""
        self.cache = None

    def extra_repr(self) -> str:
        c = self._config
        return f"{self.num_heads} heads on {c.num_kv_heads} of {c.head_dim}, {c.k_format}/{c.v_format}, {self.cache}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TQAttention":
        """What .to(), .cuda() and the like do with each tensor of a model. The cache moves along; its types stay."""
        super()._apply(fn, recurse)
        if self.cache is not None:
            # A tensor of bytes shows where they go: dtypes are changed of floating-point tensors only.
            self.cache.to(fn(torch.empty(0, dtype=torch.uint8, device=self.cache.device)).device)
        return self

    def _in_parts(
        self,
        cache: KVCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        left_padding: Tensor | Sequence[int] | None,
        options: dict[str, Any],
    ) -> Tensor:
        """`forward` of a prompt that codes blocks on its way."""
        tokens = q.shape[2]
        cache.check_room(tokens)  # for the whole prompt, before its first part is written
        outs: list[Tensor] = []
        done = 0
        while done < tokens:
            # Cut where blocks are coded: a query then sees its own block dense, as it does when tokens come one by one.
            part = slice(done, min(done + cache._tokens_at_once(), tokens))
            mask = None if attn_mask is None else self._mask_part(attn_mask, part, tokens, len(cache) + tokens - done)
            tensors = (q[:, :, part], k[:, :, part], v[:, :, part])
            outs.append(cache.step(*tensors, attn_mask=mask, left_padding=left_padding, **options)[0])
            left_padding = None  # comes with the first of them
            done = part.stop
        return torch.cat(outs, dim=2)

    def _mask_part(self, mask: Tensor, part: slice, tokens: int, positions: int) -> Tensor:
        """The rows of a mask [..., tokens or 1, positions] for some of the tokens, and the positions up to them."""
        if self._config.window is not None:
            raise ValueError(f"with a window, attn_mask cannot be cut to fit {tokens} tokens: pass fewer at a time")
        if mask.dim() < 3 or mask.shape[-2] not in (1, tokens) or mask.shape[-1] != positions:
            raise ValueError(
                f"attn_mask must be [1 or batch, (1,) 1 or {tokens}, {positions}], got shape {list(mask.shape)}"
            )
        rows = mask if mask.shape[-2] == 1 else mask[..., part, :]
        return rows[..., : mask.shape[-1] - (tokens - part.stop)]

    def _allocate(self, batch_size: int, device: torch.device) -> KVCache:
        config = {**asdict(self._config), "batch_size": batch_size}
        return KVCache(**config, device=device, k_balance=self._k_balance)
