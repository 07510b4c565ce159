"""What a decode step costs on a short context, beside attention over as long a dense cache."""

import argparse

import torch
from common import Call, Row, print_by_context
from peers import sdpa
from torch import Tensor
from turns import Contestant, Local, busy_others, measure

import torch_tqattn as tq


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=(16, 64, 256, 1024), help="at 128 n + 1, each step codes a block"
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.set_defaults(formats=("tq4/tq4", "tq8/tq4", "f16/f16"))


def run(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for context in arguments.contexts:
        contestants = contestants_of(context, arguments)
        with busy_others() as others:
            times = measure(contestants, arguments.threads, arguments.rounds, arguments.least)
        for name, of_threads in times.items():
            for threads, us in of_threads.items():
                about = {"name": name, "context": context, "head_dim": arguments.head_dim, "threads": threads}
                rows.append({**about, **us, "others": others})
    show(rows, arguments)
    return rows


def contestants_of(context: int, arguments: argparse.Namespace) -> dict[str, Contestant]:
    """Steps that make a context of this length. Each call stores at the same position."""
    q = torch.randn(1, arguments.heads, 1, arguments.head_dim)
    k, v = torch.randn(2, 1, arguments.kv_heads, 1, arguments.head_dim)
    calls: dict[str, Call] = {
        "nothing": lambda i: None,
        "aten::alias": lambda i: torch.ops.aten.alias.default(q),
        "dense cache, SDPA packed": dense_step(q, k, v, context),
    }
    for formats in arguments.formats:
        calls[f"{formats} operator, meta tensors"] = operator(context, q, k, v, formats, "meta")
        calls[f"{formats} operator"] = operator(context, q, k, v, formats, "cpu")
        calls[f"{formats} KVCache.step"] = cache_step(context, q, k, v, formats)
        calls[f"{formats} TQAttention"] = module_step(context, q, k, v, formats)
    return {name: Local(call) for name, call in calls.items()}


def dense_step(q: Tensor, k: Tensor, v: Tensor, context: int) -> Call:
    keys, values = torch.randn(2, 1, k.shape[1], context, k.shape[3])

    def call(_: int) -> Tensor:
        keys[:, :, context - 1 :] = k
        values[:, :, context - 1 :] = v
        return sdpa.packed(q, keys, values)

    return call


def cache_of(tokens: int, k: Tensor, formats: str, device: str) -> tq.KVCache:
    k_format, v_format = formats.split("/")
    cache = tq.KVCache(1, k.shape[1], k.shape[3], tokens + 64, k_format, v_format, device=device)
    if tokens:
        cache.append(*torch.randn(2, 1, k.shape[1], tokens, k.shape[3], device=device))
    return cache


def operator(context: int, q: Tensor, k: Tensor, v: Tensor, formats: str, device: str) -> Call:
    """torch.ops.tqattn.decode_step_; with meta tensors all of it but the kernels."""
    cache = cache_of(context - 1, k, formats, device)
    tensors = [x.to(device) for x in (q, k, v)]
    config = cache.config
    numbers = {"start": 0, "position": context - 1, "coded": cache._coded, "coded_end": cache._coded_end(1)}
    numbers |= {"block_size": config.block, "sink_length": config.sink_rows}
    stores = cache._stores()
    return lambda i: torch.ops.tqattn.decode_step_(*tensors, *stores, **numbers)


def cache_step(context: int, q: Tensor, k: Tensor, v: Tensor, formats: str) -> Call:
    cache = cache_of(context - 1, k, formats, "cpu")
    state = vars(cache).copy()

    def call(_: int) -> object:
        vars(cache).update(state)  # as before the step
        return cache.step(q, k, v)

    return call


def module_step(context: int, q: Tensor, k: Tensor, v: Tensor, formats: str) -> Call:
    k_format, v_format = formats.split("/")
    module = tq.TQAttention(q.shape[1], k.shape[1], k.shape[3], context + 64, k_format, v_format)
    cache = module.cache = cache_of(context - 1, k, formats, "cpu")
    state = vars(cache).copy()

    def call(_: int) -> Tensor:
        vars(cache).update(state)
        return module(q, k, v)

    return call


def show(rows: list[Row], arguments: argparse.Namespace) -> None:
    title = f"µs a step, {arguments.heads}/{arguments.kv_heads} heads of {arguments.head_dim}"
    print_by_context(rows, arguments.contexts, title, lambda row: f"{row['us']:9.1f}")
