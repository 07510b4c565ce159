"""One attention call of one token, against context: this package and what else there is."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import Call, Case, Row, bytes_read, filled_caches
from peers import ggml, hand_loop, quantized_cache, sdpa
from peers.process import Process
from tqdm import tqdm
from turns import Contestant, Local, busy_others, measure

import torch_tqattn as tq

TORCH = "best of PyTorch"
HAND_LOOP = "hand-written 4-bit loop"
QUANTO = "QuantizedCache 4-bit"


@dataclass
class Entry:
    """A contestant, and what there is to know of it."""

    contestant: Contestant
    kind: str  # ours, torch or peer
    bits: float  # a number in its cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", nargs="+", type=int, default=(1024, 4096, 16384))
    parser.add_argument("--head-dims", nargs="+", type=int, default=(128, 256))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--queries", nargs="+", default=("float32", "bfloat16"), help="types of the queries")
    parser.add_argument("--memory", type=int, default=256, help="MiB of copies that each contestant rotates through")
    parser.add_argument(
        "--ggml",
        nargs="+",
        default=(),
        metavar="NAME=FOLDER",
        help="shared libraries of ggml to time, as llama.cpp=path/to/llama.cpp/build; also those of forks",
    )
    parser.add_argument("--without", nargs="+", default=(), help="leave out: hand, quanto", choices=("hand", "quanto"))


def run(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for line in left_out(arguments):
        print(line)
    for head_dim in arguments.head_dims:
        for context in arguments.contexts:
            case = Case(context, head_dim, heads=arguments.heads, kv_heads=arguments.kv_heads)
            with busy_others() as others:
                entries = entries_of(case, arguments)
                contestants = {name: entry.contestant for name, entry in entries.items()}
                try:
                    times = measure(contestants, arguments.threads, arguments.rounds, arguments.least)
                finally:
                    for entry in entries.values():
                        entry.contestant.close()
            busy = "" if not others else f"; other processes kept {others[0]:.2f} cores busy"
            print(f"\n{case}, {torch.backends.cpu.get_cpu_capability()}{busy}")
            new = rows_of(case, entries, times, others)
            print_times(new, arguments.threads)
            print_ratios(new, max(arguments.threads))
            rows += new
    return rows


def left_out(arguments: argparse.Namespace) -> list[str]:
    lines = []
    if "quanto" not in arguments.without and (reason := quantized_cache.missing()):
        lines.append(f"left out {QUANTO}: {reason}")
    if not arguments.ggml:
        lines.append("left out llama.cpp: name its libraries with --ggml")
    return lines


def entries_of(case: Case, arguments: argparse.Namespace) -> dict[str, Entry]:
    """All contestants of a case, ready."""
    numbers = 2 * case.kv_heads * case.context * case.head_dim

    def copies(bits: float) -> int:
        return max(2, int(arguments.memory * 2**20 / (numbers * bits / 8)))

    q = torch.randn(1, case.heads, 1, case.head_dim)
    entries = {}
    for formats in tqdm(arguments.formats, desc="filling caches", leave=False):
        bits = 8 * bytes_read(case, formats) / numbers
        caches = filled_caches(case, formats, copies(bits), "cpu", torch.float32)
        for name in arguments.queries:
            entries[f"{formats}, {name}"] = Entry(Local(ours(q.to(getattr(torch, name)), caches)), "ours", bits)
    for dtype in dict.fromkeys(dtype for dtype, _ in sdpa.FORMS.values()):
        shape = (1, case.kv_heads, case.context, case.head_dim)
        bits = 8 * dtype.itemsize
        dense = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(copies(bits))]
        for name, (of, form) in sdpa.FORMS.items():
            if of == dtype:
                entries[name] = Entry(Local(sdpa.call(q, dense, form)), "torch", bits)
    shape_missing = hand_loop.missing(case.head_dim, case.context, case.heads, case.kv_heads)
    if "hand" not in arguments.without and shape_missing is None:
        bits = 4 + 32 / case.head_dim
        call = hand_loop.call(q, case.context, case.kv_heads, copies(bits))
        entries[HAND_LOOP] = Entry(Local(call), "peer", bits)
    settings = {key: getattr(case, key) for key in ("context", "head_dim", "heads", "kv_heads")}
    if "quanto" not in arguments.without and quantized_cache.missing() is None:
        settings["copies"] = copies(4.5)
        entries[QUANTO] = Entry(Process("quantized_cache", settings), "peer", 4.5)
        tuned = Process("quantized_cache", settings, quantized_cache.TUNED_MALLOC)
        entries[f"{QUANTO}, malloc tuned"] = Entry(tuned, "peer", 4.5)
    for library in arguments.ggml:
        name, _, folder = library.rpartition("=")
        for kind, bits in ggml.BITS.items():
            more = {"folder": str(Path(folder).resolve()), "type": kind, "copies": copies(bits)}
            entries[f"{name} {kind}"] = Entry(Process("ggml", {**settings, **more}), "peer", bits)
    return entries


def ours(q: torch.Tensor, caches: list[tq.KVCache]) -> Call:
    return lambda i: tq.attention(q, caches[i % len(caches)])


def rows_of(case: Case, entries: dict[str, Entry], times: dict[str, dict[int, Row]], others: list[float]) -> list[Row]:
    """A row for each contestant and number of threads; `ratios`: how many times faster it is than each peer."""
    rows: list[Row] = []
    threads = next(iter(times.values()))
    for count in threads:
        us_of = {name: times[name][count]["us"] for name in entries}
        best = min((name for name in entries if entries[name].kind == "torch"), key=us_of.__getitem__)
        peers = {TORCH: us_of[best]} | {name: us_of[name] for name in entries if entries[name].kind == "peer"}
        for name, entry in entries.items():
            us = times[name][count]
            more = {"scaling": times[name][min(threads)]["us"] / us["us"], "others": others}
            ratios = {peer: time / us["us"] for peer, time in peers.items()}
            about = {"name": name, "kind": entry.kind, "bits": entry.bits, "threads": count, "best": name == best}
            rows.append({**asdict(case), **about, **us, **more, "ratios": ratios})
    return rows


def print_times(rows: list[Row], threads: list[int]) -> None:
    """Times, and half the distance of the quarters as noise."""
    heads = "".join(f"{f'µs, {count} thread' + 's' * (count > 1):>16}{'±':>6}" for count in threads)
    print(f"{'':36}{'bits':>6}{heads}{'scaling':>9}{TORCH + ' / it':>22}")
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name]
        cells = "".join(f"{row['us']:16.0f}{noise(row):6.0%}" for row in of_name)
        last = of_name[-1]
        print(f"{name:36}{last['bits']:6.2f}{cells}{last['scaling']:9.2f}{last['ratios'][TORCH]:22.2f}")


def noise(row: Row) -> float:
    return (row["us_three_quarters"] - row["us_quarter"]) / 2 / row["us_median"]


def print_ratios(rows: list[Row], threads: int) -> None:
    """Our rows, the peers' columns."""
    rows = [row for row in rows if row["threads"] == threads and row["kind"] == "ours"]
    if not rows:
        return
    peers = list(rows[0]["ratios"])
    print(f"\nHow many times the time of this package the others take, {threads} threads:")
    for number, peer in enumerate(peers):
        print(f"  ({number}) {peer}")
    print(f"{'':36}" + "".join(f"{f'({number})':>8}" for number in range(len(peers))))
    for row in rows:
        print(f"{row['name']:36}" + "".join(f"{row['ratios'][peer]:8.2f}" for peer in peers), flush=True)
