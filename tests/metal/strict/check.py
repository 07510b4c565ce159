"""Check Metal shaders without Metal's compiler: what it refuses must be refused here.

    python tests/metal/strict/check.py FILE... [-DNAME=VALUE ...]

prints "file:line: message" for everything wrong, and exits with 1 if there is anything. Without -D every shader of the
package is checked in all of its specialisations (tests/metal/specialisations.py).
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metal import source

INCLUDE = Path(__file__).resolve().parent / "include"
FLAGS = [
    "-std=c++14",
    "-target",
    "x86_64-unknown-linux-gnu",
    "-nostdinc",
    "-nostdinc++",
    "-ffreestanding",
    "-fno-exceptions",
    "-fno-rtti",
    "-Xclang",
    "-cl-single-precision-constant",
    "-ferror-limit=0",
    "-Wall",
    "-Wextra",
    "-Wvla",
    "-Wglobal-constructors",
    "-Wc++20-designator",
    "-Wno-ignored-attributes",
    "-Wno-unused",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",
    "-Wno-missing-braces",
    "-Werror",
]


@dataclass(frozen=True, order=True)
class Problem:
    """Something that Metal's compiler would refuse, or that the project's conventions exclude."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def _for_clang(text: str) -> str:
    """The shader with attributes that macros can define, and threadgroup variables that clang can declare."""
    for variable in reversed(source.threadgroup_variables(text)):
        text = f"{text[: variable.start]}static {text[variable.start :]}"

    def attribute(name: str, argument: str | None) -> str:
        return f"[[msl_attribute_{name}{'' if argument is None else f'({argument})'}]]"

    return source.replace_attributes(text, attribute)


def check(path: Path, macros: Mapping[str, object] | None = None, text: str | None = None) -> list[Problem]:
    """Everything wrong with a shader in one specialisation.

    Args:
        path: the shader; also what messages call it, and the folder of its headers.
        macros: preprocessor macros.
        text: its text, if that is not in the file.

    Raises:
        RuntimeError: libclang is missing.
    """
    try:
        from clang import cindex
    except ImportError as error:
        raise RuntimeError("checking shaders needs libclang: pip install libclang") from error
    from metal.strict import rules

    text = path.read_text(encoding="utf-8") if text is None else text
    files = {path: text} | {header: header.read_text(encoding="utf-8") for header in path.parent.glob("*.h")}
    defines = [f"-D{name}={value}" for name, value in (macros or {}).items()]
    unit = cindex.Index.create().parse(
        str(path),
        ["-x", "c++", *FLAGS, f"-I{INCLUDE}", *defines],
        unsaved_files=[(str(file), _for_clang(contents)) for file, contents in files.items()],
    )
    included = {str(path), *(str(inclusion.include) for inclusion in unit.get_includes())}
    problems = [
        Problem(str(file), contents.count("\n", 0, contents.index(character)) + 1, f"'{character}' is not ASCII")
        for file, contents in files.items()
        if str(file) in included
        for character in sorted({c for c in contents if ord(c) > 126})
    ]
    for diagnostic in unit.diagnostics:
        if diagnostic.severity >= cindex.Diagnostic.Error:
            place = diagnostic.location
            file = place.file.name if place.file else str(path)
            problems.append(Problem(file, place.line, diagnostic.spelling))
    problems += [Problem(*found) for found in rules.broken(unit, INCLUDE)]
    return sorted(set(problems))


def _specialisations(path: Path) -> list[dict[str, object]]:
    from metal.specialisations import specialisations  # which loads torch

    return specialisations(path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all shaders of the package")
    parser.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    macros = {name: value or "1" for name, _, value in (macro.partition("=") for macro in arguments.macros)}
    problems: set[Problem] = set()
    for path in arguments.files or sorted(source.SHADERS.glob("*.metal")):
        for specialisation in [macros] if macros else _specialisations(path):
            try:
                problems.update(check(path, specialisation))
            except RuntimeError as error:  # no libclang
                parser.exit(2, f"{error}\n")
    for problem in sorted(problems):
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
