"""Decode attention straight from a TurboQuant-compressed KV cache, as PyTorch operators.

`KVCache` stores keys and values compressed; `attention` attends to it; `TQAttention` is a module that does both. `plan`
chooses formats for a model, and `fidelity` measures what they do to it. The operators underneath are
torch.ops.tqattn.*; docs/operators.md describes them, docs/format.md the storage.
"""

from . import ops as ops
from .attention import TQAttention, attention
from .cache import KVCache
from .fidelity import Plan, plan
from .format import FORMAT_VERSION, FORMATS, HEAD_DIMS, bytes_per_token

__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "HEAD_DIMS",
    "KVCache",
    "Plan",
    "TQAttention",
    "attention",
    "bytes_per_token",
    "plan",
]
