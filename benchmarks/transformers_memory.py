"""Memory of a long prompt in transformers: a compressed cache against the stock DynamicCache. Linux.

    python benchmarks/transformers_memory.py --plot memory.png --json memory.json

A tiny random Llama in bfloat16 takes a prompt, in parts or at once, then some tokens one by one. What is measured is
the resident memory of the process over what it was with the model loaded: the largest in each call. Each cache gets a
process of its own.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from torch_tqattn.integrations.transformers import TurboQuantCache

MIB = 1 << 20
STOCK = "stock"


class Peak:
    """The largest resident memory of this process while the context lasts, in bytes."""

    def __enter__(self) -> "Peak":
        self.nbytes = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, resident())

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.nbytes = max(self.nbytes, resident())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_model(layers: int, attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).eval()


def make_cache(model: LlamaForCausalLM, name: str) -> DynamicCache:
    if name == STOCK:
        return DynamicCache(config=model.config)
    k_format, v_format = name.split("/")
    return TurboQuantCache(model.config, k_format, v_format)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a model with the cache `name` ("stock" or K/V formats); bytes at each step, over the model's own."""
    torch.set_grad_enabled(False)
    model = make_model(arguments.layers, "sdpa" if name == STOCK else "tqattn")
    tokens = torch.randint(0, 256, (1, arguments.length + arguments.decode))
    warm = make_cache(model, name)
    for begin, end in ((0, 64), (64, 128), (128, 129)):
        model(input_ids=tokens[:, begin:end], past_key_values=warm)
    del warm
    cache = make_cache(model, name)
    bounds = [*range(0, arguments.length, arguments.part or arguments.length), arguments.length]
    bounds += range(arguments.length + 1, arguments.length + arguments.decode + 1)
    base = resident()
    positions: list[int] = []
    peaks: list[int] = []
    begin_time = time.perf_counter()
    for begin, end in itertools.pairwise(bounds):
        with Peak() as peak:
            model(input_ids=tokens[:, begin:end], past_key_values=cache, logits_to_keep=1)
        positions.append(end)
        peaks.append(peak.nbytes - base)
    if isinstance(cache, TurboQuantCache):
        nbytes = cache.nbytes
    else:
        nbytes = sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return {
        "name": name,
        "cache": nbytes,
        "prefill_peak": max(peaks[: -arguments.decode]),
        "decode_peak": max(peaks[-arguments.decode :]),
        "seconds": time.perf_counter() - begin_time,
        "positions": positions,
        "peaks": peaks,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in rows:
        axes.plot(row["positions"], [peak / MIB for peak in row["peaks"]], label=row["name"])
    axes.set_xlabel("positions")
    axes.set_ylabel("peak memory over the model's, MiB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=("tq8/tq4", "tq4/tq4"), metavar="K/V")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the prompt")
    parser.add_argument("--part", type=int, default=1024, help="tokens a call; 0 for the whole prompt at once")
    parser.add_argument("--decode", type=int, default=64, help="tokens after the prompt, one by one")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="draw memory over positions here")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    if platform.system() != "Linux":
        sys.exit("resident memory is read from /proc, which only Linux has")
    rows = []
    parts = f"in parts of {arguments.part}" if arguments.part else "at once"
    print(f"{arguments.length} tokens {parts}, then {arguments.decode}; {arguments.layers} layers, 4 KV heads of 128")
    print(f"{'MiB':10}{'cache':>10}{'peak, prompt':>15}{'peak, decoding':>16}{'seconds':>10}")
    for name in (STOCK, *arguments.formats):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        sizes = [row[key] / MIB for key in ("cache", "prefill_peak", "decode_peak")]
        print(f"{name:10}{sizes[0]:10.1f}{sizes[1]:15.1f}{sizes[2]:16.1f}{row['seconds']:10.1f}", flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.json:
        settings = {key: getattr(arguments, key) for key in ("length", "part", "decode", "layers")}
        arguments.json.write_text(json.dumps({**settings, "torch": torch.__version__, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
