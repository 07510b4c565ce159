"""One token with Hugging Face transformers' QuantizedCache: update, which dequantises everything, and attention.

    python -m peers.quantized_cache '{"context": 4096, ...}'

is what cpu.py runs, in a process of its own, so that malloc can be tuned by its environment. A token in residual_length
also quantises everything anew; that is left out, which makes the cache look better than it is.
"""

import importlib.util
import json
import sys

import torch
from torch.nn import functional

from peers.process import serve

# The C library gives large tensors back to the system after each use, and page faults then cost most of the time.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def missing() -> str | None:
    """Why it cannot run, if it cannot."""
    for name in ("transformers", "optimum.quanto"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name.replace('.', '-')} is not installed"
    return None


def main() -> None:
    from transformers.cache_utils import QuantoQuantizedLayer

    settings = json.loads(sys.argv[1])
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    head_dim, heads, kv_heads = settings["head_dim"], settings["heads"], settings["kv_heads"]
    q = torch.randn(1, heads, 1, head_dim)
    k, v = torch.randn(2, 1, kv_heads, 1, head_dim)
    layers = [QuantoQuantizedLayer(nbits=4) for _ in range(settings["copies"])]
    tokens = torch.randn(2, 1, kv_heads, settings["context"] - 1, head_dim)
    for layer in layers:
        layer.update(*tokens)
    states = [vars(layer).copy() for layer in layers]

    def step(i: int) -> torch.Tensor:
        layer = layers[i % len(layers)]
        vars(layer).update(states[i % len(layers)])  # without the tokens of earlier calls
        keys, values = layer.update(k, v)
        rows = q.view(1, kv_heads, -1, head_dim)
        return functional.scaled_dot_product_attention(rows, keys, values)

    serve(step, torch.set_num_threads)


if __name__ == "__main__":
    main()
