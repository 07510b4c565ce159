"""Assembles torch_tqattn's wheel for macOS from a cross-compiled library, and inspects wheels."""

import base64
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from metal.hosted.objects import PACKAGE, ROOT, run

from .torch_wheel import PLATFORM

# No part of the interpreter is linked with.
TAG = f"py3-none-{PLATFORM}"
LIBRARY = "torch_tqattn/_C.so"


def assemble(library: Path, torch_version: str, folder: Path) -> Path:
    """The wheel with this library, in `folder`. It asks for the minor release of torch that the library is built for,
    because torch's C++ interface is another one in each."""
    minor = torch_version.rpartition(".")[0]
    with tempfile.TemporaryDirectory() as temporary:
        tree, content = Path(temporary, "tree"), Path(temporary, "content")
        _copy_sources(tree)
        setup = [sys.executable, "-W", "ignore", "setup.py", "--quiet"]
        run([*setup, "build_py", "--build-lib", str(content)], tree)
        run([*setup, "dist_info", "--output-dir", str(content), "--tag-build", f"+torch{minor}"], tree)
        shutil.copy(library, content / LIBRARY)
        (info,) = content.glob("*.dist-info")
        metadata = info / "METADATA"
        text = metadata.read_text()
        metadata.write_text(text.replace("Requires-Dist: torch>=2.11\n", f"Requires-Dist: torch=={minor}.*\n"))
        (info / "WHEEL").write_text(
            f"Wheel-Version: 1.0\nGenerator: torch_tqattn\nRoot-Is-Purelib: false\nTag: {TAG}\n"
        )
        return _pack(content, info.name, folder / f"{info.name.removesuffix('.dist-info')}-{TAG}.whl")


def _copy_sources(tree: Path) -> None:
    shutil.copytree(PACKAGE, tree / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "scripts", tree / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _pack(content: Path, info: str, output: Path) -> Path:
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in sorted(path for path in content.rglob("*") if path.is_file()):
            name, data = path.relative_to(content).as_posix(), path.read_bytes()
            wheel.writestr(_entry(name), data)
            rows.writerow([name, _digest(data), len(data)])
        rows.writerow([f"{info}/RECORD", "", ""])
        wheel.writestr(_entry(f"{info}/RECORD"), record.getvalue())
    return output


def _entry(name: str) -> zipfile.ZipInfo:
    """The same for the same content, whenever it is built."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def problems(path: Path) -> list[str]:
    """What is wrong with a wheel's tag, record and content."""
    found = []
    with zipfile.ZipFile(path) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    (info,) = {name.split("/")[0] for name in content if name.split("/")[0].endswith(".dist-info")}
    if f"Tag: {TAG}\n" not in content[f"{info}/WHEEL"].decode() or not path.stem.endswith(TAG):
        found.append(f"is not tagged {TAG}")
    record = {row[0]: row[1:] for row in csv.reader(io.StringIO(content[f"{info}/RECORD"].decode()))}
    for name, data in content.items():
        wanted = ["", ""] if name == f"{info}/RECORD" else [_digest(data), str(len(data))]
        if record.pop(name, None) != wanted:
            found.append(f"does not record {name} as it is")
    found += [f"records {name}, which it does not hold" for name in record]
    modules = [source.relative_to(ROOT).as_posix() for source in PACKAGE.rglob("*.py")]
    found += [f"lacks {name}" for name in (*modules, "torch_tqattn/py.typed", LIBRARY) if name not in content]
    found += [f"holds {name}" for name in content if name.endswith((".so", ".dylib", ".o")) and name != LIBRARY]
    for shader in (PACKAGE / "shaders").glob("*.metal"):
        body = shader.read_bytes().rpartition(b'#include "')[2].partition(b"\n")[2]
        if body not in content.get(LIBRARY, b""):
            found.append(f"has a library without the source of {shader.name}")
    return found


def pip_accepts(path: Path, folder: Path) -> None:
    """Lets pip install the wheel as it would on macOS. Raises CalledProcessError if it does not."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", "--platform", PLATFORM, "--python-version", "3.12", "--target", str(folder)]
    subprocess.run([*command, str(path)], check=True)
