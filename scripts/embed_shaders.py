"""Writes the C++ header that holds the shaders' sources: python scripts/embed_shaders.py [--cuda] OUTPUT.

Each .metal file becomes one text, with the project's own headers in place of their #include lines, because a shader is
compiled from memory, where there are no files. With --cuda the texts are CUDA C++.
"""

import argparse
import os
import re
from pathlib import Path

from cuda_source import cuda_source

SHADERS = Path(__file__).resolve().parents[1] / "torch_tqattn" / "shaders"
LOCAL_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.M)
DELIMITER = "TQSHADER"


def flatten(path: Path) -> str:
    """The text of a shader with its headers in it, each once. #line keeps compilers' messages pointing to the files."""
    included: set[Path] = set()

    def expand(file: Path) -> str:
        def include(match: re.Match[str]) -> str:
            header = (file.parent / match[1]).resolve()
            if header in included:
                return "\n"
            included.add(header)
            line = text.count("\n", 0, match.start()) + 2
            return f'{expand(header)}#line {line} "{file.name}"\n'

        # Shaders are ASCII: what else Apple's compiler takes is not documented.
        text = file.read_text(encoding="ascii").replace("#pragma once\n", "\n")
        return f'#line 1 "{file.name}"\n{LOCAL_INCLUDE.sub(include, text)}'

    return expand(path)


def header(for_cuda: bool = False) -> str:
    """The C++ header: the table tqattn::kShaderSources, by the shaders' file names without their extension."""
    texts = {path.stem: cuda_source(flatten(path)) if for_cuda else flatten(path) for path in shaders()}
    entries = [f'    {{"{name}", R"{DELIMITER}({text}){DELIMITER}"}},' for name, text in texts.items()]
    return "\n".join(
        [
            "// The shaders' sources. Written by scripts/embed_shaders.py: do not edit.",
            "#pragma once",
            "",
            "namespace tqattn {",
            "",
            "struct ShaderSource {",
            "  const char* name;",
            "  const char* text;",
            "};",
            "",
            "inline constexpr ShaderSource kShaderSources[] = {",
            *entries,
            "};",
            "",
            "}  // namespace tqattn",
            "",
        ]
    )


def shaders() -> list[Path]:
    """The files that hold kernels."""
    return sorted(SHADERS.glob("*.metal"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="as CUDA C++")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    text, output = header(arguments.cuda), arguments.output
    if output.exists() and output.read_text() == text:
        return  # what depends on it need not be built again
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}")  # whole or not at all: others may be reading it
    partial.write_text(text)
    partial.replace(output)


if __name__ == "__main__":
    main()
