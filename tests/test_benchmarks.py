"""The benchmarks run, on very little. Their times are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADS = ["--heads", "4", "--kv-heads", "1"]
TABLES = {
    "attention": ["--contexts", "64", "128", "--head-dims", "128", *HEADS, "--without", "quanto"],
    "encode": ["--tokens", "130", "--hidden", "64", "--head-dim", "64", "--kv-heads", "1"],
    "step": ["--contexts", "1", "129", "--head-dim", "64", *HEADS],
    "loop": ["--contexts", "130", "--tokens", "2"],
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_cpu(table: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    common = ["--rounds", "1", "--threads", "1", "2", "--formats", "tq4/tq4", "f16/f16", "--json", str(result)]
    picture = [] if table == "encode" else ["--plot", str(tmp_path / "plot.png")]
    more = ["--memory", "1", "--capability", "avx2", "default"] if table == "attention" else []
    done = run("benchmarks/cpu.py", table, *TABLES[table], *common, *picture, *more)
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert {row["threads"] for row in rows} == {1, 2}
    assert all(row["us"] > 0 and row["name"].split(",")[0] in done.stdout for row in rows)
    assert any(row["name"].startswith("tq4/tq4") for row in rows)


def test_cpu_says_how_to_use_it() -> None:
    done = run("benchmarks/cpu.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp" in done.stdout


def test_nvidia_can_be_started() -> None:
    done = run("benchmarks/nvidia.py", "--help")
    assert done.returncode == 0, done.stderr
