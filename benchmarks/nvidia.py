"""Decode attention on an NVIDIA GPU: this package against the fastest fp16 scaled_dot_product_attention.

    python benchmarks/nvidia.py --json cuda.json --plot cuda.png

Each contestant is captured in a CUDA graph that goes through enough caches that none of it is in the L2 when its turn
comes again; the graphs take turns. Times are microseconds a call: the attention and the merging of its parts. "limit"
is the time of its bytes, codes, norms and means, at the speed at which this machine reads a large tensor in the same
run; "share" is how much of the time that is. A "step" stores a token and attends; a "coding step" also codes the block
that was full before it. Calls follow each other, and one starts while the one before it ends; "apart" is a call that
follows another library's kernel, less the time of that kernel.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import Call, Case, Row, bytes_read, filled_caches, plot, write_json
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_tqattn as tq

FORMATS = ("tq4/tq4", "tq8/tq4", "tq8/tq8", "f16/tq4", "tq6/tq4", "tq3/tq3", "f16/f16")
CONTEXTS = (1024, 4096, 16384, 32768, 131072)
SDPA = "SDPA fp16"
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


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


def apart(call: Call, copies: int, rounds: int) -> float:
    """Microseconds that a call adds to a small kernel of PyTorch, which does not let it start early."""
    x, count = torch.zeros(4096, device="cuda"), max(copies, 8) // copies * copies

    def both(i: int) -> None:
        x.add_(1)
        call(i)

    calls: dict[str, Call] = {"both": both, "other": lambda _: x.add_(1)}
    times = times_of({name: (graph_of(each, copies, count), count) for name, each in calls.items()}, rounds)
    return times["both"] - times["other"]


def read_speed() -> float:
    """Bytes a second at which a large tensor is added up."""
    x = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    graph = graph_of(lambda _: x.sum(), 1, 3)
    return x.numel() * 4 / times_of({"": (graph, 3)}, 5)[""] * 1e6


def measure(case: Case, formats: list[str], speed: float, rounds: int, with_step: bool, with_apart: bool) -> list[Row]:
    """A row for the fastest form of SDPA and for each pair of formats."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    rows: list[Row] = []

    def run(calls: dict[str, Call], copies: int) -> dict[str, float]:
        count = max(copies, 8) // copies * copies
        return times_of({name: (graph_of(call, copies, count), count) for name, call in calls.items()}, rounds)

    def add(name: str, microseconds: float, nbytes: float, **more: Any) -> None:
        limit = nbytes / speed * 1e6
        same = [row["us"] for row in rows if row["name"].endswith("apart") == name.endswith("apart")]
        baseline = same[0] if same else microseconds
        row = {**asdict(case), "name": name, "us": microseconds, "bytes": nbytes, "limit_us": limit, **more}
        rows.append({**row, "ratio": baseline / microseconds, "share": limit / microseconds})

    dense = bytes_read(case, "f16/f16")
    copies = max(2, int(2.5 * l2 / dense) + 1)
    calls = sdpa_calls(case, copies)
    found = run(calls, copies)
    best = min(found, key=lambda name: found[name])
    add(SDPA, found[best], dense, form=best)
    if with_apart:
        add(f"{SDPA} apart", apart(calls[best], copies, rounds), dense)
    del calls
    for pair in formats:
        nbytes = bytes_read(case, pair)
        copies = max(2, int(2.5 * l2 / nbytes) + 1)
        caches = filled_caches(case, pair, copies, "cuda", torch.float16)
        call = attention_call(case, caches)
        add(pair, run({"": call}, copies)[""], nbytes)
        if with_apart:
            add(f"{pair} apart", apart(call, copies, rounds), nbytes)
        if with_step and not all(name == "f16" for name in pair.split("/")):
            for name, tokens in (("step", case.context - 1), ("coding step", case.context)):
                steps = filled_caches(replace(case, context=tokens), pair, copies, "cuda", torch.float16)
                add(f"{pair} {name}", run({"": step_call(case, steps, tokens == case.context)}, copies)[""], nbytes)
        del caches, call
        torch.cuda.empty_cache()
    return rows


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
    rows: list[Row] = []
    for case in cases:
        print(f"\n{case}\n{'':20}{'µs':>9}{'SDPA / it':>11}{'limit µs':>10}{'share':>8}{'MiB':>9}")
        with_step, with_apart = case.context == 1024, case.batch == 1 and case.context in (1024, 32768)
        for row in measure(case, list(arguments.formats), speed, arguments.rounds, with_step, with_apart):
            form = f"  {row['form']}" if "form" in row else ""
            print(
                f"{row['name']:20}{row['us']:9.1f}{row['ratio']:11.2f}{row['limit_us']:10.1f}{row['share']:8.0%}"
                f"{row['bytes'] / 2**20:9.1f}{form}",
                flush=True,
            )
            rows.append(row)
    if arguments.json:
        device = torch.cuda.get_device_name()
        write_json(arguments.json, rows, device=device, torch=torch.__version__, read_speed=speed)
    if arguments.plot:
        same = [row for row in rows if (row["batch"], row["q_len"], row["heads"], row["kv_heads"]) == (1, 1, 32, 8)]
        plot([row for row in same if not row["name"].endswith(("step", "apart"))], arguments.plot, emphasised=SDPA)


if __name__ == "__main__":
    main()
