"""Attention on the CPU: this package beside what else there is, in one run.

    python benchmarks/cpu.py --json cpu.json --plot cpu.png                # one attention call of one token
    python benchmarks/cpu.py --ggml llama.cpp=llama.cpp/build              # also llama.cpp's, from its shared libraries
    python benchmarks/cpu.py --capability avx512 avx2                      # a table for each instruction set
    python benchmarks/cpu.py encode                                        # a prompt's keys and values
    python benchmarks/cpu.py step                                          # what a step costs on short contexts
    python benchmarks/cpu.py loop                                          # tokens a second of a decode loop

All contestants take turns in every round, so that a noisy moment hits them alike, and each rotates through copies of
its cache that together are larger than the processor's caches. Times are medians; ± is half the distance between the
first and the third quarter.

With --ggml: build llama.cpp or a fork of it as it says itself, with shared libraries, for this machine. --capability
changes this package, PyTorch and the hand-written loop, but not such libraries.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Row, plot, write_json
from cpu_tables import attention, encode, loop, step

import torch_tqattn as tq

FORMATS = ("tq4/tq4", "tq8/tq4", "tq6/tq4", "tq8/tq8", "tq5/tq5", "tq3/tq3", "tq2/tq2", "f16/tq4", "f16/f16")
CAPABILITIES = ("avx512", "avx2", "default")  # what PyTorch takes as ATEN_CPU_CAPABILITY
PACKAGE = Path(tq.__file__).parent
TABLES: dict[str, Any] = {"attention": attention, "encode": encode, "step": step, "loop": loop}


def parse_arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--formats", nargs="+", default=FORMATS, metavar="K/V")
    common.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    common.add_argument("--rounds", type=int, default=15)
    common.add_argument("--least", action="store_true", help="least times, not medians: for a machine that others use")
    common.add_argument("--capability", nargs="+", choices=CAPABILITIES, help="instruction sets: a table for each")
    common.add_argument("--json", type=Path, help="also write all numbers here")
    common.add_argument("--plot", type=Path, help="draw time over context here")
    common.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", metavar="{" + ",".join(TABLES) + "}")
    for name, table in TABLES.items():
        about = table.__doc__.splitlines()[0]
        table.add_arguments(tables.add_parser(name, parents=[common], help=about, description=about))
    given = sys.argv[1:]
    if not given or (given[0] not in TABLES and given[0] not in ("-h", "--help")):
        given = ["attention", *given]
    return parser.parse_args(given)


def rows_under(capability: str) -> list[Row]:
    """This program's rows in a process that uses another instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--rows", str(path)], env=environment, check=True)
        return json.loads(path.read_text())


def main() -> None:
    arguments = parse_arguments()
    if arguments.capability and not arguments.rows:
        rows = [row for capability in arguments.capability for row in rows_under(capability)]
    else:
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        capability = torch.backends.cpu.get_cpu_capability()
        print(f"{platform.machine()}, {os.cpu_count()} cores, {capability}, PyTorch {torch.__version__}, {PACKAGE}")
        rows = [{"capability": capability, **row} for row in TABLES[arguments.table].run(arguments)]
    if arguments.rows:
        arguments.rows.write_text(json.dumps(rows))
        return
    if arguments.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        # Ratios follow from the times.
        kept = [{name: x for name, x in row.items() if name != "ratios"} for row in rows]
        write_json(arguments.json, kept, **machine, table=arguments.table)
    if arguments.plot:
        draw(rows, arguments.plot)


def draw(rows: list[Row], path: Path) -> None:
    """Time over context, with the most threads, the first instruction set and the first type of queries."""
    if not all("context" in row and "us" in row for row in rows):
        sys.exit("this table has no context to draw over")
    most = max(row["threads"] for row in rows)
    best = {"name": attention.TORCH}
    same = [row for row in rows if row["threads"] == most and row["capability"] == rows[0]["capability"]]
    shown = [row | best if row.get("best") else row for row in same if row.get("best") or row.get("kind") != "torch"]
    queries = next((row["name"].partition(", ")[2] for row in shown if row.get("kind") == "ours"), "")
    shown = [row for row in shown if row.get("kind") != "ours" or row["name"].endswith(queries)]
    plot(shown, path, emphasised=attention.TORCH)


if __name__ == "__main__":
    main()
