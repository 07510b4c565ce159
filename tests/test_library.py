"""Which native library is loaded, and what is said when none fits."""

import re
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from torch_tqattn import ops

OF_ANOTHER_PYTHON = "_C.cpython-0-any.so"  # sorts before this one's


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like the package's, with a library that another Python has left there."""
    (tmp_path / OF_ANOTHER_PYTHON).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("suffix", [sysconfig.get_config_var("EXT_SUFFIX"), ".so"])
def test_the_library_of_this_python_is_loaded(suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    (folder / f"_C{suffix}").write_bytes(b"")
    ops.load_library(folder)
    assert loaded == [folder / f"_C{suffix}"]


def test_a_library_of_another_python_only(folder: Path) -> None:
    with pytest.raises(
        ImportError, match=rf"is missing from .*, which has {OF_ANOTHER_PYTHON} of another Python. Build"
    ):
        ops.load_library(folder)


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"is missing from [^,]*\. Build it, in a checkout: pip install"):
        ops.load_library(tmp_path)


def test_a_library_that_cannot_be_loaded(folder: Path) -> None:
    """As one that wants functions of another PyTorch cannot."""
    library = folder / f"_C{EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"no library")
    with pytest.raises(
        ImportError, match=f"with PyTorch {re.escape(torch.__version__)}: .* rm -rf build && pip"
    ) as raised:
        ops.load_library(folder)
    assert isinstance(raised.value.__cause__, OSError)
