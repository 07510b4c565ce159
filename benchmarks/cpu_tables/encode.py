"""Storing a prompt's keys and values, beside the projections that make them."""

import argparse

import torch
from common import Call, Row
from torch import Tensor
from torch.nn import functional
from turns import Contestant, Local, busy_others, measure

import torch_tqattn as tq
from torch_tqattn import format as fmt

PROJECTIONS = "projections"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--encodes", nargs="+", default=fmt.ENCODES, choices=fmt.ENCODES)


def run(arguments: argparse.Namespace) -> list[Row]:
    contestants: dict[str, Contestant] = {}
    about: dict[str, Row] = {}

    def add(name: str, dtype: str, contestant: Contestant, **more: object) -> None:
        contestants[f"{name}, {dtype}"] = contestant
        about[f"{name}, {dtype}"] = {"name": name, "type": dtype, **more}

    for dtype in ("float32", "bfloat16"):
        x = torch.randn(1, arguments.tokens, arguments.hidden, dtype=getattr(torch, dtype))
        columns = arguments.kv_heads * arguments.head_dim
        weights = [torch.randn(columns, arguments.hidden, dtype=x.dtype) / 32 for _ in range(2)]
        k, v = (functional.linear(x, w).unflatten(-1, (arguments.kv_heads, -1)).transpose(1, 2) for w in weights)
        add(PROJECTIONS, dtype, Local(project_call(x, weights)))
        for formats in arguments.formats:
            for encode in arguments.encodes if formats != "f16/f16" else ("plain",):
                cache = empty_cache(arguments, formats, encode)
                add(f"{formats} {encode}", dtype, Local(append_call(cache, k, v)), formats=formats, encode=encode)
    with busy_others() as others:
        times = measure(contestants, arguments.threads, arguments.rounds, arguments.least)
    rows = []
    for name, of_threads in times.items():
        for threads, us in of_threads.items():
            projections = times[f"{PROJECTIONS}, {about[name]['type']}"][threads]["us"]
            rows.append({**about[name], "threads": threads, **us, "share": us["us"] / projections, "others": others})
    sizes = f"{arguments.tokens} tokens, {arguments.hidden} to 2 x {arguments.kv_heads} x {arguments.head_dim}"
    show(rows, sizes, arguments.threads)
    return rows


def empty_cache(arguments: argparse.Namespace, formats: str, encode: str) -> tq.KVCache:
    sizes = (1, arguments.kv_heads, arguments.head_dim, arguments.tokens)
    k_format, v_format = formats.split("/")
    return tq.KVCache(*sizes, k_format, v_format, encode=encode)


def project_call(x: Tensor, weights: list[Tensor]) -> Call:
    return lambda i: [functional.linear(x, weight) for weight in weights]


def append_call(cache: tq.KVCache, k: Tensor, v: Tensor) -> Call:
    def call(_: int) -> None:
        cache.reset()
        cache.append(k, v)

    return call


def show(rows: list[Row], sizes: str, threads: list[int]) -> None:
    print(f"\n{sizes}; share of the time of the projections of that type")
    print(f"{'':28}" + "".join(f"{f'ms, {count} threads':>15}{'share':>9}" for count in threads))
    for name, dtype in dict.fromkeys((row["name"], row["type"]) for row in rows):
        cells = [row for row in rows if (row["name"], row["type"]) == (name, dtype)]
        print(f"{f'{name}, {dtype}':28}" + "".join(f"{row['us'] / 1e3:15.2f}{row['share']:9.1%}" for row in cells))
