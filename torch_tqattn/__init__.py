"""Decode attention straight from a TurboQuant-compressed KV cache, as PyTorch operators.

`KVCache` stores keys and values compressed; `attention` attends to it; `TQAttention` is a module that does both. The
operators underneath are torch.ops.tqattn.*; docs/operators.md describes them, docs/format.md the storage.
"""

from . import ops as ops
from .attention import TQAttention, attention
from .cache import KVCache
from .format import FORMAT_VERSION, FORMATS, HEAD_DIMS, bytes_per_token

__all__ = ["FORMATS", "FORMAT_VERSION", "HEAD_DIMS", "KVCache", "TQAttention", "attention", "bytes_per_token"]
