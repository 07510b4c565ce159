"""Writes the C++ header that holds the shaders' sources: python scripts/embed_shaders.py OUTPUT.

Each .metal file becomes one text, with the project's own headers in place of their #include lines, because a shader is
compiled from memory, where there are no files. The same header serves every backend that compiles at run time.
"""

import re
import sys
from pathlib import Path

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


def header() -> str:
    """The C++ header: the table tqattn::kShaderSources, by the shaders' file names without their extension."""
    entries = [f'    {{"{path.stem}", R"{DELIMITER}({flatten(path)}){DELIMITER}"}},' for path in shaders()]
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


def main(output: Path) -> None:
    text = header()
    if output.exists() and output.read_text() == text:
        return  # what depends on it need not be built again
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
