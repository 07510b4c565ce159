"""Hugging Face transformers: `TurboQuantCache`, a cache for `generate`, and the attention "tqattn" that reads it.

Importing this module registers "tqattn". docs/transformers.md says how to use both, and what is supported.
"""

import transformers
from packaging.version import Version

REQUIRED = "5.20"  # as in pyproject.toml; tests/test_transformers.py compares them

if Version(transformers.__version__) < Version(REQUIRED):
    raise ImportError(
        f"torch_tqattn.integrations.transformers needs transformers {REQUIRED} or newer, found "
        f'{transformers.__version__}: pip install --upgrade "transformers>={REQUIRED}"'
    )

# What they import, older versions do not have.
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from .attention import tqattn_attention  # noqa: E402
from .cache import LayerReport, TurboQuantCache  # noqa: E402

AttentionInterface.register("tqattn", tqattn_attention)
AttentionMaskInterface.register("tqattn", sdpa_mask)  # without a mask function, padding would be ignored

__all__ = ["LayerReport", "TurboQuantCache"]
