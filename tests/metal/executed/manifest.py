"""Kernels of a preprocessed shader and their arguments, and the C++ that binds them."""

import re
from dataclasses import dataclass

from metal import source

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

_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
_ARGUMENT = re.compile(r"(\w+)\s*\[\[\s*(\w+)\s*(?:\(\s*(\d+)[uU]?\s*\))?\s*\]\]\s*$")


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel; `attribute` is buffer, threadgroup, or one of BUILTINS."""

    name: str
    attribute: str
    index: int


@dataclass(frozen=True)
class Kernel:
    name: str
    arguments: tuple[Argument, ...]
    threadgroup_variables: tuple[source.ThreadgroupVariable, ...]


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
        if match is None or (match[2] not in (*BUILTINS, "buffer", "threadgroup")):
            raise ValueError(f"kernel {kernel}: cannot bind the argument '{' '.join(part.split())}'")
        arguments.append(Argument(match[1], match[2], int(match[3] or 0)))
    return tuple(arguments)


def kernels(text: str) -> list[Kernel]:
    """The kernels of a preprocessed shader; ValueError if an argument has no attribute that can be bound."""
    code = source.masked(text)
    variables = source.threadgroup_variables(text)
    found = []
    for match in _KERNEL.finditer(code):
        end = _closing(code, match.end() - 1, "()")
        body = code.find("{", end)
        body_end = _closing(code, body, "{}")
        inside = tuple(v for v in variables if body < v.start < body_end)
        found.append(Kernel(match[1], _arguments(match[1], code[match.end() : end]), inside))
    return found


def as_cpp(text: str) -> str:
    """The shader as C++: attributes taken out, threadgroup variables as references to memory of the threadgroup."""
    variables = source.threadgroup_variables(text)
    for index, v in reversed(list(enumerate(variables))):
        call = f'::msl_runtime::threadgroup_variable({index}, "{v.name}", sizeof({v.type}{v.extents}))'
        reference = f"{v.type} (&{v.name}){v.extents} = *static_cast<{v.type} (*){v.extents}>({call})"
        text = text[: v.start] + reference + text[v.end :]
    return source.replace_attributes(text, lambda name, argument: "")


def _camel_case(builtin: str) -> str:
    return "k" + "".join(word.capitalize() for word in builtin.split("_"))


def bindings(found: list[Kernel]) -> str:
    """C++ that follows the shader: what kernel_abi.h says of each kernel, and functions that call them."""
    lines = []
    for k in found:
        values, table = [], []
        for i, a in enumerate(k.arguments):
            argument = f"::msl_runtime::Argument<{k.name}, {i}>"
            if a.attribute in BUILTINS:
                builtin = f"::msl_runtime::Builtin::{_camel_case(a.attribute)}"
                values.append(f"::msl_runtime::builtin_value<{argument}>({builtin})")
                table.append(f'::msl_runtime::builtin_argument("{a.name}")')
            else:
                memory, kind = (
                    ("buffer", "MSL_BUFFER") if a.attribute == "buffer" else ("threadgroup_memory", "MSL_THREADGROUP")
                )
                values.append(f"::msl_runtime::memory_value<{argument}>(::msl_runtime::{memory}({a.index}))")
                table.append(f'::msl_runtime::memory_argument<{argument}>("{a.name}", {kind}, {a.index})')
        size = " + ".join(["0", *(f"(sizeof({v.type}{v.extents}) + 15) / 16 * 16" for v in k.threadgroup_variables)])
        lines += [
            f"static void msl_call_{k.name}() {{ {k.name}({', '.join(values)}); }}",
            f"static const MslArgument msl_arguments_{k.name}[] = {{ {', '.join(table)} }};",
            f"extern const MslKernel msl_kernel_{k.name};",
            f"static int msl_run_{k.name}(const MslDispatch* dispatch) {{",
            f"  return ::msl_runtime::run(msl_kernel_{k.name}, msl_call_{k.name}, *dispatch);",
            "}",
            f'const MslKernel msl_kernel_{k.name} = {{ "{k.name}", msl_arguments_{k.name}, {len(k.arguments)}, {size},',
            f"                                      msl_run_{k.name} }};",
        ]
    addresses = ", ".join([*(f"&msl_kernel_{k.name}" for k in found), "nullptr"])
    lines.append(f"static const MslKernel* const msl_kernels[] = {{ {addresses} }};")
    return "\n".join(lines)
