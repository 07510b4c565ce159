"""The instrument's results for people: tables and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extra import require

OURS, PEER = "#0b6e99", "#c8553d"
# The line from a point to a label that had to move away, to the middle of the label's left side.
LEADER = {"arrowstyle": "-", "color": "0.8", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5}
LEAST = 1e-12  # what a logarithmic axis shows of a divergence of nothing


def aligned(lines: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Cells in columns, the first one to the left, with a rule under the first `heads` lines."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    return "\n".join([*rows[:heads], "-" * len(rows[0]), *rows[heads:]])


def by_size(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, largest first."""
    return sorted(result["rows"], key=lambda row: (-row["bytes_per_token"], row["loop"]["kld"]))


def table(result: dict[str, Any]) -> str:
    """One line a candidate, and above them what they are compared with."""
    edges = sorted({edge for row in (result["exact"], *result["rows"]) for edge in row["recall"]})
    heads = ("cache", "/token", "/number", "KLD", "99.9%", "top-1", "KLD", "99.9%", "top-1", "bits/byte")
    over = {1: "bytes", 2: "bits", 3: "coded", 6: "loop", len(heads): "recall"}
    columns = (*heads, *(f"<={edge}" for edge in edges))
    lines: list[Sequence[str]] = [[over.get(i, "") for i in range(len(columns))], columns]

    def counts(row: dict[str, Any]) -> list[str]:
        return ["/".join(map(str, row["recall"].get(edge, ("-",)))) for edge in edges]

    bits = f"{result['exact']['bits_per_byte']:.4f}"
    lines.append(("exact", *[""] * 8, bits, *counts(result["exact"])))
    for row in by_size(result):
        coded, loop = (
            (f"{row[view]['kld']:.2e}", f"{row[view]['kld_p999']:.2e}", f"{row[view]['top1']:.2%}")
            for view in ("coded", "loop")
        )
        size = (f"{row['bytes_per_head']:.1f}", f"{row['bits_per_number']:.2f}")
        lines.append((row["cache"], *size, *coded, *loop, f"{row['loop']['bits_per_byte']:.4f}", *counts(row)))
    sizes = sorted({(layer["kv_heads"], layer["head_dim"]) for layer in result["layers"]})
    layers = " and ".join(f"{count} KV heads of {head_dim}" for count, head_dim in sizes)
    return "\n".join(
        (
            f"{title(result['settings'])}; {len(result['layers'])} layers, {layers}",
            "bytes a token: of one KV head, K and V. coded: every query reads codes. loop: what a decode loop sees, "
            "its newest tokens dense.",
            "",
            aligned(lines, heads=2),
        )
    )


def title(settings: dict[str, Any]) -> str:
    return f"{settings['model']}, {settings['windows']} x {settings['context']} tokens of text"


def heads_table(result: dict[str, Any]) -> str:
    """The errors on synthetic heads, one line a candidate."""
    rows = [row for row in by_size(result) if row["heads"]]
    names = list(rows[0]["heads"]) if rows else []
    tables = []
    for key, title in (("kld", "KL divergence of the attention weights"), ("error", "relative error of the output")):
        lines = [("cache", *names)]
        lines += [(row["cache"], *(f"{row['heads'][name][key]:.1e}" for name in names)) for row in rows]
        tables.append(f"Synthetic heads, all codes: {title}\n\n{aligned(lines)}")
    return "\n\n".join(tables)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw KL divergence against bytes a token into a file; its suffix says what kind."""
    figure = require("matplotlib.figure").Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    rows = by_size(result)
    points = [(row["bytes_per_head"], max(row["loop"]["kld"], LEAST)) for row in rows]
    axes.plot(*zip(*front(points), strict=True), color="0.75", lw=1.2, zorder=1, label="best for the size")
    for (x, y), row in zip(points, rows, strict=True):
        colour = PEER if row["peer"] else OURS
        if row["coded"]["kld"] > y:
            axes.plot([x, x], [y, row["coded"]["kld"]], color=colour, lw=0.8, alpha=0.5, zorder=2)
            axes.plot(x, row["coded"]["kld"], "o", mfc="white", mec=colour, ms=4.5, zorder=3)
        axes.plot(x, y, "s" if row["peer"] else "o", color=colour, mec="white", ms=7, zorder=4)
    axes.plot([], [], "o", color=OURS, label="torch_tqattn, in a decode loop")
    axes.plot([], [], "o", mfc="white", mec=OURS, label="torch_tqattn, all codes")
    axes.plot([], [], "s", color=PEER, label="others")
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("bytes a token and KV head, K and V")
    axes.set_ylabel("KL divergence from the exact model, nats")
    axes.set_title(title(result["settings"]), loc="left")
    axes.grid(True, which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.draw_without_rendering()  # places the axes, so that labels can be placed in pixels
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    per_point = figure.dpi / 72
    heights = label_heights(pixels, [6 * len(row["cache"]) * per_point for row in rows], 12 * per_point)
    for point, (_, y), height, row in zip(points, pixels, heights, rows, strict=True):
        axes.annotate(
            row["cache"],
            point,
            xytext=(14, (height - y) / per_point),
            textcoords="offset points",
            verticalalignment="center",
            color=PEER if row["peer"] else OURS,
            fontsize=9,
            arrowprops=LEADER if height > y else None,
        )
    figure.savefig(path, dpi=160)


def label_heights(points: Sequence[tuple[float, float]], widths: Sequence[float], step: float) -> list[float]:
    """Heights for labels that begin at these points, each as low as it can be without lying on a lower one."""
    heights = [0.0] * len(points)
    placed: list[tuple[float, float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, height = points[i]
        for left, right, taken in sorted(placed, key=lambda label: label[2]):
            if left < x + widths[i] and x < right and abs(height - taken) < step:
                height = taken + step
        heights[i] = height
        placed.append((x, x + widths[i], height))
    return heights
