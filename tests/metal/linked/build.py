"""Cross-compiles torch_tqattn for macOS on arm64, on any machine, as setup.py would compile it there.

zig brings the compiler, the linker and libSystem; the headers of metal/hosted stand in for Apple's; and of macOS's
other libraries there is what torch's own take from them, which is sure to be there on macOS 14.
"""

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from metal.hosted.objects import (
    BUILD,
    HEADERS,
    ROOT,
    ZIG,
    check_zig,
    compile_all,
    digest,
    make,
    run,
)

from . import torch_wheel

MACOS = "14.0"
TARGET = f"aarch64-macos.{MACOS}"
# Where a wheel puts the library and torch's, seen from the library.
RPATH = "@loader_path/../torch/lib"
# zig has all of it.
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"


def extension_for_macos() -> Any:
    """The extension as setup.py describes it on macOS. The shaders' sources are embedded then."""
    from torch.utils.cpp_extension import BuildExtension  # noqa: F401  (reads this machine's own configuration)

    before = os.getcwd()
    os.chdir(ROOT)
    try:
        with (
            mock.patch.object(sys, "platform", "darwin"),
            mock.patch("setuptools.setup") as setup,
            mock.patch.dict(os.environ),
        ):
            runpy.run_path("setup.py")
    finally:
        os.chdir(before)
    (extension,) = setup.call_args.kwargs["ext_modules"]
    return extension


def language(torch: Path) -> str:
    """The flag for the C++ version that this torch compiles extensions with."""
    flags = set(re.findall(r"-std=c\+\+\d+", (torch / "utils" / "cpp_extension.py").read_text()))
    (flag,) = flags
    return flag


def stubs(torch: Path, folder: Path) -> Path:
    """The folder, with text files that stand for those libraries and frameworks of macOS that torch links with."""
    for install_name, symbols in torch_wheel.system_imports(torch).items():
        name = Path(install_name).name
        path = folder / f"{name}.framework" / f"{name}.tbd" if ".framework/" in install_name else folder / f"{name}.tbd"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{install_name}'\n"
            "exports:\n  - targets: [ arm64-macos ]\n"
            f"    symbols: [ {', '.join(repr(symbol) for symbol in sorted(symbols))} ]\n...\n"
        )
    return folder


def library(version: str) -> Path:
    """torch_tqattn/_C.so for macOS and this version of torch."""
    check_zig()
    torch = torch_wheel.fetch(version)
    folder = BUILD / f"linked-torch-{version}"
    extension = extension_for_macos()
    sources = [ROOT / source for source in sorted(extension.sources)]
    include = [str(torch / "include"), str(torch / "include/torch/csrc/api/include")]
    flags = [
        *["-target", TARGET, language(torch), "-g0", "-fblocks", "-Werror"],
        # torch's libraries do without it, so the stub of macOS's C++ library does not have it.
        "-fno-sized-deallocation",
        # zig's C++ library is the newest; with these it uses nothing that macOS 14's does not have.
        "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
        "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
        *extension.extra_compile_args,
        *[f"-I{HEADERS}", *[part for path in include for part in ("-isystem", path)]],
    ]
    objects = compile_all(sources, flags, folder)
    macos = stubs(torch, folder / "stubs")
    options = [
        *["-target", TARGET, "-shared", "-nostdlib++", "-Wl,-install_name,@rpath/_C.so", f"-Wl,-rpath,{RPATH}"],
        *[f"-F{macos}", *extension.extra_link_args, "-framework", "CoreFoundation"],  # which Foundation stands for
        *[str(macos / name) for name in ("libc++.1.dylib.tbd", "libobjc.A.dylib.tbd")],
        *[f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"],
    ]
    inputs = [str(path) for path in objects]
    name = digest([*inputs, *options])
    return make(folder / f"_C-{name}.so", lambda output: run([*ZIG, *inputs, *options, "-o", str(output)]))
