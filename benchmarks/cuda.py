"""Decode attention on an NVIDIA GPU: this package against the fastest fp16 scaled_dot_product_attention.

    python benchmarks/cuda.py --json cuda.json --plot cuda.png

Each contestant is captured in a CUDA graph that goes through enough caches that none of it is in the L2 when its turn
comes again; the graphs take turns. Times are microseconds a call: the attention and the merging of its parts. "limit"
is the time of its bytes, codes, norms and means, at the speed at which this machine reads a large tensor in the same
run; "share" is how much of the time that is. A "step" stores a token and attends; a "coding step" also codes the block
that was full before it.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_tqattn as tq

FORMATS = ("tq4/tq4", "tq8/tq4", "tq8/tq8", "f16/tq4", "tq6/tq4", "tq3/tq3", "f16/f16")
CONTEXTS = (1024, 4096, 16384, 32768, 131072)
SDPA = "SDPA fp16"
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
FILL = 8192  # tokens appended at a time
Call = Callable[[int], object]


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


def graph_of(call: Call, copies: int, calls: int) -> torch.cuda.CUDAGraph:
    """`calls` calls, each on the next of the copies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i % copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    return graph


def times_of(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Median microseconds a call of graphs that take turns; each comes with its number of calls."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(rounds + 1):
        for name, (graph, calls) in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def sdpa_calls(case: Case, copies: int) -> dict[str, Call]:
    """Every form of it that runs: heads of a group as queries of one head where that is the same, or grouped heads."""
    shape = (case.batch, case.kv_heads, case.context, case.head_dim)
    caches = [torch.randn(2, *shape, device="cuda", dtype=torch.float16) for _ in range(copies)]
    q = torch.randn(case.batch, case.heads, case.q_len, case.head_dim, device="cuda", dtype=torch.float16)
    packed = q.view(case.batch, case.kv_heads, -1, case.head_dim)  # the newest tokens see each other; as fast
    grouped = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    calls: dict[str, Call] = {}
    for backend in BACKENDS:
        for form, query, options in (("packed", packed, {}), ("grouped", q, grouped)):

            def call(i: int, backend: Any = backend, query: Tensor = query, options: Any = options) -> Tensor:
                with sdpa_kernel(backend):
                    return functional.scaled_dot_product_attention(query, caches[i][0], caches[i][1], **options)

            try:
                call(0)
            except RuntimeError:
                continue  # this backend does not take it
            calls[f"{backend.name.split('_')[0].lower()}, {form}"] = call
    return calls


def bytes_read(case: Case, formats: str) -> float:
    k_format, v_format = formats.split("/")
    return case.batch * case.kv_heads * case.context * tq.bytes_per_token(k_format, v_format, case.head_dim)


def filled_caches(case: Case, formats: str, copies: int) -> list[tq.KVCache]:
    k_format, v_format = formats.split("/")
    first = tq.KVCache(case.batch, case.kv_heads, case.head_dim, case.context + 64, k_format, v_format, device="cuda")
    for begin in range(0, case.context, FILL):
        shape = (2, case.batch, case.kv_heads, min(FILL, case.context - begin), case.head_dim)
        first.append(*torch.randn(shape, device="cuda", dtype=torch.float16))
    return [first, *(copy.deepcopy(first) for _ in range(copies - 1))]


def attention_call(case: Case, caches: list[tq.KVCache]) -> Call:
    q = torch.randn(case.batch, case.heads, case.q_len, case.head_dim, device="cuda", dtype=torch.float16)
    return lambda i: tq.attention(q, caches[i])


def step_call(case: Case, caches: list[tq.KVCache], codes_a_block: bool) -> Call:
    """decode_step_: store a token and attend, each time at the same position.

    The caches must be one token short of a whole block, or have one that waits for the next token to be coded.
    """
    held = [(cache._length, cache._coded) for cache in caches]
    q = torch.randn(case.batch, case.heads, 1, case.head_dim, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, case.batch, case.kv_heads, 1, case.head_dim, device="cuda", dtype=torch.float16)

    def call(i: int) -> None:
        caches[i]._length, caches[i]._coded = held[i]
        caches[i].step(q, k, v)
        assert (caches[i]._coded != held[i][1]) == codes_a_block

    return call


def read_speed() -> float:
    """Bytes a second at which a large tensor is added up."""
    x = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    graph = graph_of(lambda _: x.sum(), 1, 3)
    return x.numel() * 4 / times_of({"": (graph, 3)}, 5)[""] * 1e6


def measure(case: Case, formats: list[str], speed: float, rounds: int, with_step: bool) -> list[dict[str, Any]]:
    """A row for the fastest form of SDPA and for each pair of formats."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    rows: list[dict[str, Any]] = []

    def run(calls: dict[str, Call], copies: int) -> dict[str, float]:
        count = max(copies, 8) // copies * copies
        return times_of({name: (graph_of(call, copies, count), count) for name, call in calls.items()}, rounds)

    def add(name: str, microseconds: float, nbytes: float, **more: Any) -> None:
        limit = nbytes / speed * 1e6
        baseline = rows[0]["us"] if rows else microseconds
        row = {**asdict(case), "name": name, "us": microseconds, "bytes": nbytes, "limit_us": limit, **more}
        rows.append({**row, "ratio": baseline / microseconds, "share": limit / microseconds})

    dense = bytes_read(case, "f16/f16")
    copies = max(2, int(2.5 * l2 / dense) + 1)
    found = run(sdpa_calls(case, copies), copies)
    best = min(found, key=lambda name: found[name])
    add(SDPA, found[best], dense, form=best)
    for pair in formats:
        nbytes = bytes_read(case, pair)
        copies = max(2, int(2.5 * l2 / nbytes) + 1)
        caches = filled_caches(case, pair, copies)
        add(pair, run({"": attention_call(case, caches)}, copies)[""], nbytes)
        if with_step and not all(name == "f16" for name in pair.split("/")):
            for name, tokens in (("step", case.context - 1), ("coding step", case.context)):
                steps = filled_caches(replace(case, context=tokens), pair, copies)
                add(f"{pair} {name}", run({"": step_call(case, steps, tokens == case.context)}, copies)[""], nbytes)
        del caches
        torch.cuda.empty_cache()
    return rows


def as_json(result: dict[str, Any]) -> str:
    """A line a row, numbers to four digits."""
    short = [{k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in row.items()} for row in result["rows"]]
    lines = ",\n".join(json.dumps(row) for row in short)
    head = json.dumps({k: x for k, x in result.items() if k != "rows"})
    return f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if (row["batch"], row["q_len"], row["heads"], row["kv_heads"]) == (1, 1, 32, 8)]
    head_dims = sorted({row["head_dim"] for row in rows})
    figure, axes = pyplot.subplots(1, len(head_dims), figsize=(6 * len(head_dims), 4.5), squeeze=False)
    for head_dim, axis in zip(head_dims, axes[0], strict=True):
        for name in dict.fromkeys(row["name"] for row in rows if not row["name"].endswith("step")):
            points = [(row["context"], row["us"]) for row in rows if (row["name"], row["head_dim"]) == (name, head_dim)]
            style = {"color": "black", "linewidth": 2.5} if name == SDPA else {}
            axis.plot(*zip(*sorted(points), strict=True), label=name, marker=".", **style)
        axis.set(xscale="log", yscale="log", title=f"head dim {head_dim}", xlabel="positions", ylabel="µs a call")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="K/V")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=(128, 256))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--more", action="store_true", help="also batches, as many KV heads as heads, 4 query tokens")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    parser.add_argument("--plot", type=Path, help="draw time over context here")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    cases = [Case(context, head_dim) for head_dim in arguments.head_dims for context in arguments.contexts]
    if arguments.more:
        for head_dim in arguments.head_dims:
            cases += [Case(8192, head_dim, batch=8), Case(4096, head_dim, batch=32)]
            cases += [Case(16384, head_dim, kv_heads=32), Case(16384, head_dim, q_len=4)]
    speed = read_speed()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, reads {speed / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    for case in cases:
        print(f"\n{case}\n{'':20}{'µs':>9}{'SDPA / it':>11}{'limit µs':>10}{'share':>8}{'MiB':>9}")
        is_short = case.context == 1024
        for row in measure(case, list(arguments.formats), speed, arguments.rounds, is_short):
            form = f"  {row['form']}" if "form" in row else ""
            print(
                f"{row['name']:20}{row['us']:9.1f}{row['ratio']:11.2f}{row['limit_us']:10.1f}{row['share']:8.0%}"
                f"{row['bytes'] / 2**20:9.1f}{form}",
                flush=True,
            )
            rows.append(row)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "read_speed": speed, "rows": rows}
    if arguments.json:
        arguments.json.write_text(as_json(result))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
