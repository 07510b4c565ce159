"""How true a compressed cache is to a model: measured on its logits, its recall, and on heads made to be difficult.

`divergence` measures one candidate on one model; `evaluate` all of `python -m torch_tqattn eval`; `plan` chooses
formats layer by layer. Hugging Face models need transformers, which the extra "eval" installs.
"""

from .balance import balance_keys
from .candidates import Candidate, Exact, Part, Storage, View, parse, parse_storage, per_layer
from .evaluation import evaluate
from .heads import difficult_heads, head_errors
from .measure import Metrics, divergence
from .models import CallableModel, HuggingFaceModel, Model, Text, cut
from .plan import Plan, plan, uniform_bytes

__all__ = [
    "CallableModel",
    "Candidate",
    "Exact",
    "HuggingFaceModel",
    "Metrics",
    "Model",
    "Part",
    "Plan",
    "Storage",
    "Text",
    "View",
    "balance_keys",
    "cut",
    "difficult_heads",
    "divergence",
    "evaluate",
    "head_errors",
    "parse",
    "parse_storage",
    "per_layer",
    "plan",
    "uniform_bytes",
]
