"""Where the shaders are, how the build reads them, and the barriers in them."""

import re
from dataclasses import dataclass
from pathlib import Path

from metal_source import BUILTINS, Kernel, kernels, masked, replace_attributes, threadgroup_variables

__all__ = ["BUILTINS", "Kernel", "kernels", "masked", "replace_attributes", "threadgroup_variables"]

ROOT = Path(__file__).resolve().parents[2]
SHADERS = ROOT / "torch_tqattn" / "shaders"

_BARRIER = re.compile(r"\b(?P<name>threadgroup_barrier|simdgroup_barrier)\s*\([^;]*?\)\s*;")


@dataclass(frozen=True)
class Barrier:
    name: str
    line: int
    start: int
    end: int


def barriers(text: str) -> list[Barrier]:
    """All barriers in the text, in order."""
    return [
        Barrier(match["name"], text.count("\n", 0, match.start()) + 1, *match.span())
        for match in _BARRIER.finditer(masked(text))
    ]


def without_barrier(text: str, index: int) -> str:
    """The text with its barrier of this index taken out."""
    barrier = barriers(text)[index]
    spaces = re.sub(r"[^\n]", " ", text[barrier.start + 1 : barrier.end])
    return f"{text[: barrier.start]};{spaces}{text[barrier.end :]}"
