"""The shaders are Metal as far as that can be told without Metal's compiler, and the check that says so works."""

import subprocess
import sys
from pathlib import Path

import pytest
from metal import needs, source
from metal.specialisations import specialisations
from metal.strict.check import check
from metal.strict.snippets import SNIPPETS, Snippet

SCRIPT = Path(source.__file__).parent / "strict" / "check.py"
SHADERS = sorted(source.SHADERS.glob("*.metal"))
SAMPLES = Path(source.__file__).parent / "executed" / "kernels"


@pytest.fixture(autouse=True)
def _tools() -> None:
    needs.libclang()


def check_all(shader: Path, macros: list[dict[str, object]]) -> None:
    assert sorted({str(problem) for m in macros for problem in check(shader, m)}) == []


@pytest.mark.parametrize("shader", SHADERS, ids=lambda path: path.name)
def test_shaders_are_metal(shader: Path) -> None:
    check_all(shader, specialisations(shader.name)[::5])


@pytest.mark.slow
@pytest.mark.parametrize("shader", SHADERS, ids=lambda path: path.name)
def test_shaders_are_metal_in_every_specialisation(shader: Path) -> None:
    check_all(shader, specialisations(shader.name))


@pytest.mark.parametrize("shader", sorted(SAMPLES.glob("*.metal")), ids=lambda path: path.name)
def test_kernels_of_tests_are_metal(shader: Path) -> None:
    assert check(shader) == []


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_wrong_snippets_are_refused_and_right_ones_accepted(snippet: Snippet) -> None:
    assert [str(problem) for problem in check(Path("right.metal"), text=snippet.right)] == []
    messages = [problem.message for problem in check(Path("wrong.metal"), text=snippet.wrong)]
    assert any(snippet.message in message for message in messages), messages


def test_names_of_snippets_differ() -> None:
    assert len({snippet.name for snippet in SNIPPETS}) == len(SNIPPETS)


def test_problems_have_their_lines(tmp_path: Path) -> None:
    (tmp_path / "helper.h").write_text("inline float* f(thread float* x) { return x; }\n")
    shader = tmp_path / "wrong.metal"
    shader.write_text(
        '#include <metal_stdlib>\nusing namespace metal;\n/* a\ncomment */\n#include "helper.h"\n'
        "kernel void k(device float* a [[buffer(0)]]) {\n"
        "  threadgroup float t[TQ_N];\n  t[0] = 1.0;\n  a[0] = t[0];\n}\n"
    )
    done = subprocess.run([sys.executable, SCRIPT, shader, "-DTQ_N=4"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{tmp_path}/helper.h:1: the result of 'f' has no address space",
        f"{shader}:8: 1.0 needs the suffix f or h",
    ]


def test_the_script_accepts_what_is_right() -> None:
    done = subprocess.run([sys.executable, SCRIPT, SAMPLES / "sums.metal", "-DTQ_N=4"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
