"""Hugging Face transformers: `TurboQuantCache`, a cache for `generate`, and the attention "tqattn" that reads it.

Importing this module registers "tqattn". docs/transformers.md says how to use both, and what is supported.
"""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .attention import tqattn_attention
from .cache import LayerReport, TurboQuantCache

AttentionInterface.register("tqattn", tqattn_attention)
AttentionMaskInterface.register("tqattn", sdpa_mask)  # without a mask function, padding would be ignored

__all__ = ["LayerReport", "TurboQuantCache"]
