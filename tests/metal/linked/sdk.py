"""Compiles torch_tqattn for macOS with Apple's own headers instead of this project's declarations of them.

    python tests/metal/linked/sdk.py MacOSX.sdk

where MacOSX.sdk is an SDK of macOS 14 or newer, which comes with Xcode and cannot be handed out here. Every warning is
an error. Frameworks that torch's headers name and nothing uses (MetalPerformanceShaders and its graphs) may be missing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ziglang

from metal.hosted.objects import HEADERS, ROOT, embed_shaders, run
from metal.linked import torch_wheel
from metal.linked.build import MACOS, extension_for_macos, language

CLANG = [sys.executable, "-m", "ziglang", "clang"]
WARNINGS = ["-Wall", "-Wextra", "-Wunguarded-availability", "-Werror"]
NEEDED = ("usr/include/c++/v1/vector", "System/Library/Frameworks/Metal.framework/Headers/Metal.h")


def check_sdk(sdk: Path) -> None:
    """FileNotFoundError if that is no SDK of macOS."""
    for name in NEEDED:
        if not (sdk / name).exists():
            raise FileNotFoundError(f"{sdk} is no SDK of macOS: it has no {name}")


def compile_source(source: Path, sdk: Path, version: str) -> list[Path]:
    """The headers of that SDK and of this project that one of the extension's sources was compiled with.

    Raises:
        RuntimeError: with what the compiler said, be it a warning.
    """
    torch = torch_wheel.fetch(version)
    include = [torch / "include", torch / "include/torch/csrc/api/include"]
    flags = [
        *[f"--target=arm64-apple-macos{MACOS}", language(torch), "-isysroot", str(sdk), "-O1", "-fblocks", *WARNINGS],
        # The compiler's own headers and the SDK's, and none of zig's.
        *["-nostdlibinc", "-nobuiltininc", "-isystem", str(sdk / "usr/include/c++/v1")],
        *["-isystem", str(Path(ziglang.__file__).parent / "lib/include"), "-isystem", str(sdk / "usr/include")],
        *["-iframework", str(sdk / "System/Library/Frameworks")],
        *extension_for_macos().extra_compile_args,
        *[part for folder in include for part in ("-isystem", str(folder))],
        f"-I{embed_shaders()}",
        *["-idirafter", str(HEADERS)],  # what the SDK does not have
    ]
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "dependencies"
        output = ["-MD", "-MF", str(listed), "-c", str(source), "-o", str(Path(folder) / "object.o")]
        run([*CLANG, *flags, *output])
        headers = [Path(word) for word in listed.read_text().split() if word.endswith(".h")]
    return [header for header in headers if header.is_relative_to(sdk) or header.is_relative_to(HEADERS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdk", type=Path)
    sdk = parser.parse_args().sdk.resolve()
    try:
        check_sdk(sdk)
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    for version in torch_wheel.VERSIONS:
        for source in sorted(extension_for_macos().sources):
            headers = compile_source(ROOT / source, sdk, version)
            apples = sum(header.is_relative_to(sdk) for header in headers)
            ours = sorted({header.parent.name for header in headers if header.is_relative_to(HEADERS)})
            print(f"torch {version}: {source}: {apples} headers of the SDK; declared here: {', '.join(ours) or 'none'}")


if __name__ == "__main__":
    main()
