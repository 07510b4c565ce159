"""Metal shaders as text: the few things that a C++ compiler cannot be taught by macros.

Positions and line numbers never change: what is taken out is replaced by spaces.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

BUILTINS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)

_NOT_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.S)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
_ATTRIBUTE = re.compile(r"\[\[\s*(?P<name>\w+)\s*(?:\((?P<argument>[^()]*)\)\s*)?\]\]")
_THREADGROUP_VARIABLE = re.compile(
    r"(?<=[;{}])\s*(?P<declaration>threadgroup\s+(?P<type>[\w:]+(?:\s*<[^;<>]*>)?)\s+(?P<name>\w+)\s*"
    r"(?P<extents>(?:\[[^\];]*\]\s*)*)(?:=[^;]*)?);"
)
_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
_ARGUMENT = re.compile(r"(.*?)(\w+)\s*\[\[\s*(\w+)\s*(?:\(\s*(\d+)[uU]?\s*\))?\s*\]\]\s*$", re.S)


@dataclass(frozen=True)
class ThreadgroupVariable:
    """`threadgroup type name extents;` and where it is in the text, without the semicolon."""

    start: int
    end: int
    type: str
    name: str
    extents: str


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel; `attribute` is buffer, threadgroup, or one of BUILTINS."""

    name: str
    attribute: str
    index: int
    type: str  # with its address space


@dataclass(frozen=True)
class Kernel:
    name: str
    arguments: tuple[Argument, ...]
    threadgroup_variables: tuple[ThreadgroupVariable, ...]
    start: int  # of `kernel void`, up to the brace that opens the body
    body: int


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


def _closing(text: str, start: int, pair: str) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"'{pair[0]}' without '{pair[1]}'")


def _arguments(kernel: str, text: str) -> tuple[Argument, ...]:
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([<") - (character in ")]>")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    arguments = []
    for part in [*parts, text[start:]]:
        if not part.strip():
            continue
        match = _ARGUMENT.search(part)
        if match is None or (match[3] not in (*BUILTINS, "buffer", "threadgroup")):
            raise ValueError(f"kernel {kernel}: cannot bind the argument '{' '.join(part.split())}'")
        arguments.append(Argument(match[2], match[3], int(match[4] or 0), " ".join(match[1].split())))
    return tuple(arguments)


def kernels(text: str) -> list[Kernel]:
    """The kernels of a shader; ValueError if an argument has no attribute that can be bound."""
    code = masked(text)
    variables = threadgroup_variables(text)
    found = []
    for match in _KERNEL.finditer(code):
        end = _closing(code, match.end() - 1, "()")
        body = code.find("{", end)
        body_end = _closing(code, body, "{}")
        inside = tuple(v for v in variables if body < v.start < body_end)
        found.append(Kernel(match[1], _arguments(match[1], code[match.end() : end]), inside, match.start(), body))
    return found
