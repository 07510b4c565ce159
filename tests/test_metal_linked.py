"""torch_tqattn cross-compiles for macOS on arm64, links with torch's own libraries, and makes a wheel."""

import os
import re
import struct
from pathlib import Path

import pytest
from metal.hosted.objects import MissingToolError
from metal.linked import build, check, macho, torch_wheel, wheel

pytestmark = pytest.mark.timeout(900)  # compiles much when nothing is cached yet

WORKFLOW = build.ROOT / ".github" / "workflows" / "wheels.yml"


@pytest.fixture(scope="module", params=torch_wheel.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def torch_folder(version: str) -> Path:
    try:
        build.check_zig()
        return torch_wheel.fetch(version)
    except MissingToolError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(version: str, torch_folder: Path) -> Path:
    return build.library(version)


def test_wheels_are_published_from_the_oldest_to_the_newest() -> None:
    (listed,) = re.findall(r"torch: \[(.*)\]", WORKFLOW.read_text())
    published = re.findall(r'"(.*?)"', listed)
    assert (published[0], published[-1]) == torch_wheel.VERSIONS


def test_the_library_is_one_that_macos_can_load(library: Path, torch_folder: Path) -> None:
    assert check.problems(library, torch_folder) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"kernel void", b"kernel vojd", "was changed after it was signed"),
        (struct.pack("<II", 1, 14 << 16), struct.pack("<II", 1, 13 << 16), "needs macOS 13.0 and not 14.0"),
        (b"@loader_path/..", b"/opt/of/builder", "looks for torch in ['/opt/of/builder/torch/lib']"),
        (b"@rpath/_C.so", b"/build/_C.so", "has the install name /build/_C.so"),
        (b"/libtorch_cpu.", b"/libtorch_gpu.", "loads @rpath/libtorch_gpu.dylib"),
        (b"11getInstanceEv", b"11getinstanceEv", "wants __ZN2at3mps9MPSDevice11getinstanceEv of @rpath/libtorch_cpu"),
    ],
)
def test_what_macos_would_not_load_is_seen(
    old: bytes, new: bytes, expected: str, library: Path, torch_folder: Path, tmp_path: Path
) -> None:
    data = library.read_bytes()
    assert old in data
    changed = tmp_path / "_C.so"
    changed.write_bytes(data.replace(old, new))
    assert any(expected in problem for problem in check.problems(changed, torch_folder))


def test_code_for_another_processor_is_refused(library: Path, torch_folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "_C.so"
    changed.write_bytes(library.read_bytes().replace(struct.pack("<I", macho.ARM64), struct.pack("<I", 0x01000007), 1))
    with pytest.raises(ValueError, match="is no library for arm64"):
        check.problems(changed, torch_folder)


def test_the_wheel(library: Path, version: str, tmp_path: Path) -> None:
    path = wheel.assemble(library, version, tmp_path)
    assert wheel.problems(path) == []
    minor = version.rpartition(".")[0]
    assert f"+torch{minor}-py3-none-macosx_14_0_arm64.whl" in path.name
    wheel.pip_accepts(path, tmp_path / "installed")
    (metadata,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    assert f"Requires-Dist: torch=={minor}.*" in metadata.read_text()
