"""Tokens a second of the decode loop of examples/, with the compressed and with the dense cache."""

import argparse
import sys
from pathlib import Path

import torch
from common import Call, Row, print_by_context
from turns import Contestant, Local, busy_others, measure

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.append(str(EXAMPLES))

from byte_model import ByteModel  # noqa: E402
from decode_loop import Cache, CompressedCache, DenseCache  # noqa: E402

PART = 256  # tokens of a prompt at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", nargs="+", type=int, default=(128, 512, 2048, 4096))
    parser.add_argument("--tokens", type=int, default=128, help="tokens that a loop decodes; a block of them is coded")


def run(arguments: argparse.Namespace) -> list[Row]:
    model = ByteModel.from_pretrained(EXAMPLES / "model")
    rows: list[Row] = []
    for context in arguments.contexts:
        caches = [dense_cache(model, context + arguments.tokens)]
        caches += [CompressedCache(model.config, context + arguments.tokens, name) for name in arguments.formats]
        contestants: dict[str, Contestant] = {
            cache.name: Local(loop_call(model, cache, context, arguments.tokens)) for cache in caches
        }
        with busy_others() as others:
            times = measure(contestants, arguments.threads, arguments.rounds, arguments.least)
        for name, of_threads in times.items():
            for threads, us in of_threads.items():
                dense = times[caches[0].name][threads]["us"]
                speed = {"tokens_per_second": arguments.tokens / us["us"] * 1e6, "ratio": dense / us["us"]}
                about = {"name": name, "context": context, "head_dim": model.config.head_dim, "threads": threads}
                rows.append({**about, **us, **speed, "others": others})
    show(rows, arguments)
    return rows


def dense_cache(model: ByteModel, capacity: int) -> Cache:
    return DenseCache(model.config, capacity, torch.device("cpu"), torch.float32)


def loop_call(model: ByteModel, cache: Cache, context: int, tokens: int) -> Call:
    """Decodes `tokens` tokens after the same prompt each time."""
    text = (EXAMPLES / "model" / "heldout.txt").read_bytes()
    for begin in range(0, context, PART):
        part = text[begin : min(begin + PART, context)]
        model(torch.tensor([list(part)]), cache.attend, begin)
    if isinstance(cache, DenseCache):
        states = [(vars(cache), {"lengths": list(cache.lengths)})]
    else:
        assert isinstance(cache, CompressedCache)
        states = [(vars(layer.cache), vars(layer.cache).copy()) for layer in cache.layers]

    def call(_: int) -> None:
        # As long as after the prompt. What the loop left in the dense tail is not the prompt's, but costs as much.
        for variables, state in states:
            variables.update({name: list(x) if isinstance(x, list) else x for name, x in state.items()})
        token = torch.tensor([[32]])
        for i in range(tokens):
            token = model(token, cache.attend, context + i)[:, -1].argmax(-1, keepdim=True)

    return call


def show(rows: list[Row], arguments: argparse.Namespace) -> None:
    title = "tokens a second, and that over the dense cache's"
    print_by_context(rows, arguments.contexts, title, lambda row: f"{row['tokens_per_second']:9.0f}{row['ratio']:7.2f}")
