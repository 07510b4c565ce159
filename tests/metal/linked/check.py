"""What has to be true of a library that macOS 14 is to load next to torch."""

from pathlib import Path

from . import torch_wheel
from .build import LIBSYSTEM, RPATH
from .macho import MachO

FRAMEWORKS = "/System/Library/Frameworks"
SYSTEM_LIBRARIES = {
    LIBSYSTEM,
    "/usr/lib/libc++.1.dylib",
    "/usr/lib/libobjc.A.dylib",
    f"{FRAMEWORKS}/CoreFoundation.framework/Versions/A/CoreFoundation",
    f"{FRAMEWORKS}/Foundation.framework/Versions/C/Foundation",
    f"{FRAMEWORKS}/Metal.framework/Versions/A/Metal",
}


def problems(path: Path, torch: Path) -> list[str]:
    """What is wrong with the library, beside the torch/ folder of a wheel for macOS. Raises ValueError if it is no
    library for arm64."""
    library = MachO(path)
    found = []
    if library.minimum_macos != "14.0":
        found.append(f"needs macOS {library.minimum_macos} and not 14.0")
    if library.rpaths != [RPATH]:
        found.append(f"looks for torch in {library.rpaths} and not in {RPATH}")
    if library.install_name is not None and not library.install_name.startswith("@rpath/"):
        found.append(f"has the install name {library.install_name}, which is of the machine that built it")
    exports = {f"@rpath/{known.path.name}": known.exports for known in torch_wheel.libraries(torch)}
    found += [f"loads {name}" for name in library.libraries if name not in exports and name not in SYSTEM_LIBRARIES]
    system = torch_wheel.system_imports(torch)
    for wanted in library.imports:
        if wanted.library == LIBSYSTEM:
            continue  # the linker has looked it up in zig's list
        if wanted.symbol not in (exports.get(wanted.library) or system.get(wanted.library) or set()):
            found.append(f"wants {wanted.symbol} of {wanted.library}, where it is not known to be")
    try:
        library.check_signature()
    except ValueError as error:
        found.append(str(error))
    return found
