"""Metal shaders as text: the few things that a C++ compiler cannot be taught by macros, and where barriers are.

Positions and line numbers never change: what is taken out is replaced by spaces.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHADERS = ROOT / "torch_tqattn" / "shaders"

_NOT_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.S)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
_ATTRIBUTE = re.compile(r"\[\[\s*(?P<name>\w+)\s*(?:\((?P<argument>[^()]*)\)\s*)?\]\]")
_THREADGROUP_VARIABLE = re.compile(
    r"(?<=[;{}])\s*(?P<declaration>threadgroup\s+(?P<type>[\w:]+(?:\s*<[^;<>]*>)?)\s+(?P<name>\w+)\s*"
    r"(?P<extents>(?:\[[^\];]*\]\s*)*)(?:=[^;]*)?);"
)
_BARRIER = re.compile(r"\b(?P<name>threadgroup_barrier|simdgroup_barrier)\s*\([^;]*?\)\s*;")


@dataclass(frozen=True)
class ThreadgroupVariable:
    """`threadgroup type name extents;` and where it is in the text, without the semicolon."""

    start: int
    end: int
    type: str
    name: str
    extents: str


@dataclass(frozen=True)
class Barrier:
    name: str
    line: int
    start: int
    end: int


def _spaces(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def masked(text: str) -> str:
    """The text with spaces for comments, literals in quotes and preprocessor lines."""
    return _DIRECTIVE.sub(_spaces, _NOT_CODE.sub(_spaces, text))


def replace_attributes(text: str, new: Callable[[str, str | None], str]) -> str:
    """The text with every `[[name(argument)]]` replaced by new(name, argument)."""
    for match in reversed(list(_ATTRIBUTE.finditer(masked(text)))):
        text = text[: match.start()] + new(match["name"], match["argument"]) + text[match.end() :]
    return text


def threadgroup_variables(text: str) -> list[ThreadgroupVariable]:
    """Declarations of threadgroup variables, pointers excepted, one per statement."""
    return [
        ThreadgroupVariable(*match.span("declaration"), match["type"], match["name"], match["extents"].strip())
        for match in _THREADGROUP_VARIABLE.finditer(masked(text))
    ]


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
