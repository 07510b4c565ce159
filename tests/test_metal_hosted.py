"""The Objective-C++ of the MPS backend runs on Linux, against a double of Metal, on real mps tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from metal.hosted import build

pytestmark = pytest.mark.timeout(900)  # compiles much when nothing is cached yet

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    try:
        build.check_tools()
    except build.MissingToolError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def run_under_the_double(*arguments: str) -> None:
    """A process of its own, because torch asks only once whether there is an mps device."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "metal.hosted", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]


def test_the_double_and_the_backend() -> None:
    run_under_the_double("tests/metal/hosted/suite.py")


def test_rotations_tests_run_on_mps_as_they_are() -> None:
    run_under_the_double("tests/test_ops.py", "tests/test_seed_ops.py", "-k", "mps and (test_rotation or test_premult)")
