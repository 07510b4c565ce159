"""Names a wheel that pip has built on macOS for the torch it was built with, and inspects it.

    python .github/pack_wheel.py BUILT.whl FOLDER

pip calls it by the interpreter, which the library does not depend on, and not by torch, which it does.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from metal.linked import wheel
from metal.linked.macho import MachO

MINIMUM_MACOS = "14.0"


def problems(library: Path) -> list[str]:
    """What is wrong with the library."""
    found = []
    native = MachO(library)
    if native.minimum_macos != MINIMUM_MACOS:
        found.append(f"needs macOS {native.minimum_macos} and not {MINIMUM_MACOS}")
    try:
        native.check_signature()
    except ValueError as error:
        found.append(str(error))
    return found


def main(built: Path, folder: Path) -> int:
    version = torch.__version__.partition("+")[0]
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if Path(name).match("torch_tqattn/_C*.so"))
        library = Path(archive.extract(name, temporary))
        path = wheel.assemble(library, version, folder)
        found = [*problems(library), *wheel.problems(path)]
    print(path, *found, sep="\n  ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
