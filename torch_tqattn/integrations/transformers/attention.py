"""The attention function that a model with attn_implementation="tqattn" calls."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .forward import Handle
from .queries import Queries, visibility

# Arguments of other attention functions that change the result: it would be wrong without them.
UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks", "block_table", "cache")


def tqattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers model over what `TurboQuantCache.update` returned, or over tensors.

    Args:
        query: [batch, heads, tokens, head_dim].
        key, value: handles of the cache, or tensors [batch, kv_heads, positions, head_dim].
        attention_mask: [batch, 1, tokens, positions], bool or additive; None for all that causality allows.
        s_aux: [heads], attention sinks.

    Returns:
        [batch, tokens, heads, head_dim] in query's dtype, and None for the weights.

    Raises:
        NotImplementedError: an argument that changes the result and is not supported.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"tqattn does not support {name}, which {type(module).__name__} passes; use eager"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    queries = Queries(module, query, attention_mask, causal, scale, softcap or 0.0, s_aux)
    if isinstance(key, Handle):
        if dropout:
            raise NotImplementedError(f"a compressed cache is for inference: dropout must be 0, got {dropout}")
        queries = replace(queries, mask=visibility(attention_mask))
        key.forward.learn_padding(queries.mask)
        out = key.forward.attend(queries)
    else:
        out = queries.over_tensors(key, value, dropout)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None
