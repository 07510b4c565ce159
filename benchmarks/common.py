"""What the benchmarks of all devices share."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torch_tqattn as tq

FILL = 8192  # tokens appended at a time
Call = Callable[[int], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What attends to what."""

    context: int
    head_dim: int = 128
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    q_len: int = 1

    def __str__(self) -> str:
        return (
            f"context {self.context}, head dim {self.head_dim}, batch {self.batch}, "
            f"{self.heads}/{self.kv_heads} heads, {self.q_len} query tokens"
        )


def bytes_read(case: Case, formats: str) -> float:
    k_format, v_format = formats.split("/")
    return case.batch * case.kv_heads * case.context * tq.bytes_per_token(k_format, v_format, case.head_dim)


def filled_caches(case: Case, formats: str, copies: int, device: str, dtype: torch.dtype) -> list[tq.KVCache]:
    """Caches of random tokens, with room for 64 more."""
    k_format, v_format = formats.split("/")
    first = tq.KVCache(case.batch, case.kv_heads, case.head_dim, case.context + 64, k_format, v_format, device=device)
    for begin in range(0, case.context, FILL):
        shape = (2, case.batch, case.kv_heads, min(FILL, case.context - begin), case.head_dim)
        first.append(*torch.randn(shape, device=device, dtype=dtype))
    return [first, *(copy.deepcopy(first) for _ in range(copies - 1))]


def write_json(path: Path, rows: list[Row], **settings: Any) -> None:
    """A line a row, numbers to four digits."""
    short = [{k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in row.items()} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in short)
    path.write_text(f'{json.dumps(settings)[:-1]}, "rows": [\n{lines}\n]}}\n')


def print_by_context(rows: list[Row], contexts: list[int], title: str, cell: Callable[[Row], str]) -> None:
    """A table for each number of threads: a line a name, a column a context. Cells are all as wide."""
    for threads in dict.fromkeys(row["threads"] for row in rows):
        of_threads = [row for row in rows if row["threads"] == threads]
        width = len(cell(of_threads[0]))
        print(f"\n{title}, {threads} threads\n{'context':40}" + "".join(f"{context:{width}}" for context in contexts))
        for name in dict.fromkeys(row["name"] for row in of_threads):
            print(f"{name:40}" + "".join(cell(row) for row in of_threads if row["name"] == name))


def plot(rows: list[Row], path: Path, emphasised: str) -> None:
    """Time over context, a picture for each head dim; peers' lines are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dims = sorted({row["head_dim"] for row in rows})
    figure, axes = pyplot.subplots(1, len(head_dims), figsize=(6 * len(head_dims) + 2, 5), squeeze=False)
    for head_dim, axis in zip(head_dims, axes[0], strict=True):
        axis.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
        for name in dict.fromkeys(row["name"] for row in rows):
            same = [row for row in rows if (row["name"], row["head_dim"]) == (name, head_dim)]
            points = sorted((row["context"], row["us"]) for row in same)
            style: dict[str, Any] = {"linestyle": "--"} if any(row.get("kind") == "peer" for row in same) else {}
            if name == emphasised:
                style = {"color": "black", "linewidth": 2.5}
            axis.plot(*zip(*points, strict=True), label=name, marker=".", **style)
        axis.set(xscale="log", yscale="log", title=f"head dim {head_dim}", xlabel="positions", ylabel="µs a call")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
