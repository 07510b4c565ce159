"""The Objective-C++ of the MPS backend runs on Linux, against a double of Metal, on real mps tensors."""

import os
import sys

import pytest
from metal import mutations, source
from metal.hosted import build, process

pytestmark = [
    pytest.mark.timeout(900),  # compiles much when nothing is cached yet
    pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac the tests have the real device"),
]


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    try:
        build.check_tools()
    except build.MissingToolError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def check(*arguments: str, mode: str = "plain") -> None:
    done = process.run(arguments, mode)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]


def test_the_double_and_the_backend() -> None:
    check("tests/metal/hosted/suite.py")


@pytest.mark.parametrize("mode", ["race", "sanitised"])
def test_every_kernel_under_checks(mode: str) -> None:
    """With half of the samples: `make test-metal MODE=race` has them all."""
    check("tests/test_kernels.py", "--every", "2", mode=mode)


def test_what_takes_a_device_runs_as_it_is() -> None:
    """A part of it: `make test-metal` runs it all."""
    check("tests", "-k", "mps", "-m", "not slow", "--every", "64")


def test_memory_errors_are_seen() -> None:
    """A write past the end of an allocation stops a sanitised process."""
    done = process.run(
        ["tests/metal/hosted/suite.py", "-k", "test_a_write_past_the_end_is_seen or test_rotate_many"],
        mode="sanitised",
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout + done.stderr


# Mutations; metal/mutations.py runs them all


def test_every_mutation_has_its_place() -> None:
    assert len({mutation.name for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    for mutation in mutations.MUTATIONS:
        assert mutation.mutated() != mutation.path.read_text()


def test_every_barrier_is_taken_out_by_a_mutation() -> None:
    for shader in sorted(source.SHADERS.iterdir()):
        if shader.name in ("attend_matrix.metal", "cluster.h", "encode_block.metal", "matrix.h"):
            continue  # no plan for Metal has it; test_attend_matrix.py and test_encode_block.py take its barriers out
        taken = [
            mutation
            for mutation in mutations.MUTATIONS
            if mutation.path == shader
            and len(source.barriers(mutation.mutated())) == len(source.barriers(shader.read_text())) - 1
        ]
        assert len(taken) == len(source.barriers(shader.read_text())), shader.name


@pytest.mark.parametrize(
    "mutation", [m for m in mutations.MUTATIONS if mutations.BARRIER in m.old], ids=lambda m: m.name
)
def test_a_missing_barrier_is_noticed(mutation: mutations.Mutation) -> None:
    is_noticed, by = mutations.run(mutation)
    assert is_noticed, by
