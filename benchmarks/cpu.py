"""Decode attention on the CPU: this package against PyTorch's scaled_dot_product_attention in float32.

    python benchmarks/cpu.py --threads 2 --json cpu.json

One query token. All contestants take turns in every round, so that a noisy moment hits them alike, and each rotates
through enough copies of its cache that nothing is left in the processor's caches from its last turn.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

import torch_tqattn as tq
from torch_tqattn import format as fmt

DEFAULT_FORMATS = ("tq4/tq4", "tq8/tq4", "tq8/tq8", "tq6/tq4", "tq5/tq5", "tq3/tq3", "tq2/tq2", "f16/tq4", "f16/f16")
Call = Callable[[int], object]


def sdpa(q: torch.Tensor, kv_heads: int, length: int, copies: int, grouped: bool) -> Call:
    """float32 attention: `enable_gqa`, or the faster form with a group's heads as queries of one KV head."""
    shape = (1, kv_heads, length, q.shape[-1])
    caches = [(torch.randn(shape), torch.randn(shape)) for _ in range(copies)]
    if grouped:
        return lambda i: functional.scaled_dot_product_attention(q, *caches[i % copies], enable_gqa=True)
    rows = q.view(1, kv_heads, -1, q.shape[-1])
    return lambda i: functional.scaled_dot_product_attention(rows, *caches[i % copies])


def compressed(q: torch.Tensor, kv_heads: int, length: int, copies: int, formats: str) -> Call:
    """tq.attention over caches filled with random tokens; copies share one set of them."""
    k_format, v_format = formats.split("/")
    first = tq.KVCache(1, kv_heads, q.shape[-1], length, k_format, v_format)
    for begin in range(0, length, 4096):
        shape = (1, kv_heads, min(4096, length - begin), q.shape[-1])
        first.append(torch.randn(shape), torch.randn(shape))
    caches = [first]
    for _ in range(copies - 1):
        caches.append(tq.KVCache(1, kv_heads, q.shape[-1], length, k_format, v_format))
        caches[-1].load_state_dict(first.state_dict())
    return lambda i: tq.attention(q, caches[i % copies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=DEFAULT_FORMATS, metavar="K/V")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128, choices=fmt.HEAD_DIMS)
    parser.add_argument("--length", type=int, default=16384, help="positions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", type=int, default=1024, help="MiB that each contestant rotates through")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    q = torch.randn(1, arguments.heads, 1, arguments.head_dim)
    tokens = arguments.kv_heads * arguments.length

    def copies(bytes_per_token: float) -> int:
        return max(2, int(arguments.memory * 2**20 / (tokens * bytes_per_token)))

    contestants: dict[str, Call] = {}
    with torch.inference_mode():
        dense = copies(8 * arguments.head_dim)
        contestants["SDPA float32, enable_gqa"] = sdpa(q, arguments.kv_heads, arguments.length, dense, True)
        contestants["SDPA float32, heads packed"] = sdpa(q, arguments.kv_heads, arguments.length, dense, False)
        for formats in tqdm(arguments.formats, desc="filling caches", leave=False):
            k_format, v_format = formats.split("/")
            count = copies(tq.bytes_per_token(k_format, v_format, arguments.head_dim))
            contestants[formats] = compressed(q, arguments.kv_heads, arguments.length, count, formats)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for i in tqdm(range(arguments.rounds + 1), desc="measuring", leave=False):
            for name, call in contestants.items():
                begin = time.perf_counter()
                call(i)
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - begin)
    best = statistics.median(times["SDPA float32, heads packed"])
    rows = []
    shapes = f"{arguments.heads} heads, {arguments.kv_heads} KV heads of {arguments.head_dim}"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{shapes}, {arguments.length} positions, {arguments.threads} threads, {capability}, torch {torch.__version__}"
    )
    print(f"{'':28}{'median us':>10}{'min':>8}{'max':>9}{'x packed SDPA':>15}")
    for name, seconds in times.items():
        row = {"name": name, "median_us": statistics.median(seconds) * 1e6, "min_us": min(seconds) * 1e6}
        row |= {"max_us": max(seconds) * 1e6, "speedup": best / statistics.median(seconds)}
        rows.append(row)
        print(f"{name:28}{row['median_us']:10.0f}{row['min_us']:8.0f}{row['max_us']:9.0f}{row['speedup']:15.2f}")
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        machine = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
        arguments.json.write_text(
            json.dumps({**settings, **machine, "torch": torch.__version__, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
