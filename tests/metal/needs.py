"""What the tests of the shaders need beyond the package's own dependencies."""

import importlib.util
import os

import pytest

from metal.executed.compile import compiler


def _need(is_there: bool, message: str) -> None:
    """Skip the test, or in continuous integration fail it, unless the tool is there."""
    if not is_there:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def libclang() -> None:
    _need(importlib.util.find_spec("clang") is not None, "checking shaders needs libclang: pip install libclang")


def cpp_compiler() -> None:
    try:
        compiler()
    except RuntimeError as error:
        _need(False, str(error))
