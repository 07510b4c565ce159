"""A decode loop on a compressed KV cache, beside the same loop on a dense one.

    python examples/decode_loop.py                                  # the project's byte model and text
    python examples/decode_loop.py --formats tq8/tq4 tq3/tq2 --context 4096 --json result.json

For each K/V format it streams the generated text, then scores held-out text token by token, and prints a table: cache
size, speed, how many generated tokens agree with the dense cache, KL divergence of the logits from the dense cache's,
how often the most likely byte is the same, and bits per byte. ":plain" after a format codes every token as it comes
with an uncorrected norm, as plain TurboQuant does.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from byte_model import ByteModel, ByteModelConfig
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import torch_tqattn as tq

HERE = Path(__file__).resolve().parent
DEFAULT_FORMATS = ("tq8/tq8", "tq8/tq4", "tq4/tq4", "tq4/tq4:plain", "tq3/tq3", "tq2/tq2")


class Cache(Protocol):
    """What the model's attention needs of a cache of all layers."""

    name: str

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    @property
    def nbytes(self) -> int: ...


class DenseCache:
    """Keys and values as the model computes them, and PyTorch's own attention."""

    def __init__(self, config: ByteModelConfig, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, capacity, config.head_dim)
        self.name = f"dense {str(dtype).removeprefix('torch.')}"
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * config.num_hidden_layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then attend causally. q [1, Hq, T, D], k and v [1, Hkv, T, D]."""
        begin, end = self.lengths[layer], self.lengths[layer] + k.shape[2]
        self.buffer[layer, 0, :, :, begin:end] = k
        self.buffer[layer, 1, :, :, begin:end] = v
        self.lengths[layer] = end
        keys, values = self.buffer[layer, :, :, :, :end]
        if q.shape[2] == 1:  # the heads of a group as queries of one head: much faster than enable_gqa on a CPU
            rows = q.reshape(1, keys.shape[1], -1, q.shape[3])
            return functional.scaled_dot_product_attention(rows, keys, values).reshape(q.shape)
        mask = torch.ones(q.shape[2], end, dtype=torch.bool, device=q.device).tril(begin)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()


class CompressedCache:
    """One TQAttention, with its compressed cache, for each layer."""

    def __init__(self, config: ByteModelConfig, capacity: int, formats: str) -> None:
        self.name = formats
        pair, _, variant = formats.partition(":")
        k_format, _, v_format = pair.partition("/")
        if variant not in ("", "plain"):
            raise ValueError(f"unknown variant {variant!r} in {formats!r}; write K/V or K/V:plain")
        options: dict[str, Any] = {"block_size": 0, "sink_length": 0, "encode": "plain"} if variant else {}
        self.layers = [
            tq.TQAttention(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                capacity,
                k_format,
                v_format or k_format,
                **options,
            )
            for _ in range(config.num_hidden_layers)
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then attend causally. q [1, Hq, T, D], k and v [1, Hkv, T, D]."""
        return self.layers[layer](q, k, v)

    @property
    def nbytes(self) -> int:
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def generate(
    model: ByteModel, cache: Cache, prompt: Tensor, count: int, temperature: float, show: Callable[[bytes], None]
) -> tuple[list[int], float]:
    """`count` bytes after the prompt [1, T], and the tokens a second of the loop (the prompt not counted).

    The noise of sampling depends on the step alone, so caches that agree on the logits agree on the text.
    """
    noise = torch.Generator().manual_seed(0)
    logits = model(prompt, cache.attend)[:, -1]
    generated: list[int] = []
    begin = time.perf_counter()
    for step in range(count):
        scores = logits[0].cpu()
        if temperature > 0:
            uniform = torch.rand(scores.shape, generator=noise).clamp(min=1e-20)
            scores = scores / temperature - (-uniform.log()).log()
        generated.append(int(scores.argmax()))
        show(bytes(generated[-1:]))
        token = torch.tensor([generated[-1:]], device=prompt.device)
        logits = model(token, cache.attend, prompt.shape[1] + step)[:, -1]
    return generated, count / (time.perf_counter() - begin)


def log_probabilities(model: ByteModel, tokens: Tensor, cache: Cache, label: str) -> Tensor:
    """Log-probabilities [T, 256] (float64, CPU) after each of the tokens [1, T], fed one at a time."""
    rows = []
    for i in tqdm(range(tokens.shape[1]), desc=f"scoring {label}", unit="token", leave=False):
        rows.append(model(tokens[:, i : i + 1], cache.attend, i)[0, 0].cpu())
    return torch.stack(rows).double().log_softmax(-1)


def compare(tokens: Tensor, got: Tensor, exact: Tensor) -> dict[str, float]:
    """How far log-probabilities [T, 256] are from the dense cache's, and how well they predict tokens [1, T]."""
    divergence = (exact.exp() * (exact - got)).sum(-1)
    following = tokens[0, 1:].cpu()[:, None]
    return {
        "kld": divergence.mean().item(),
        "kld_p999": divergence.quantile(0.999).item(),
        "top1": (got.argmax(-1) == exact.argmax(-1)).double().mean().item(),
        "bits_per_byte": -got[:-1].gather(-1, following).mean().item() / math.log(2),
    }


def leading_agreement(a: list[int], b: list[int]) -> int:
    """How many tokens two texts share from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def table(rows: list[dict[str, Any]]) -> str:
    """The result for people."""
    heads = ("cache", "KiB", "of f16", "tok/s", "same tokens", "KLD", "KLD 99.9%", "top-1", "bits/byte")
    lines = [heads]
    for r in rows:
        numbers = (f"{r['kld']:.2e}", f"{r['kld_p999']:.2e}", f"{r['top1']:.2%}", f"{r['bits_per_byte']:.4f}")
        size = (f"{r['nbytes'] / 1024:.0f}", f"{r['share_of_f16']:.0%}", f"{r['tokens_per_second']:.0f}")
        lines.append((r["cache"], *size, f"{r['agreement']}/{r['generated']}", *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    first, *others = widths
    aligned = [
        line[0].ljust(first) + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], others, strict=True))
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def best_device() -> str:
    """An Apple GPU, an NVIDIA GPU, or the CPU: the first of them that is here."""
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=DEFAULT_FORMATS, metavar="K/V", help="storage formats to show")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="directory of a byte model")
    parser.add_argument(
        "--text", type=Path, default=HERE / "model" / "heldout.txt", help="text to prompt and score with"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of text that are scored")
    parser.add_argument("--prompt-length", type=int, default=1024, help="bytes of the text that start the generation")
    parser.add_argument("--generate", type=int, default=200, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely byte")
    parser.add_argument("--device", default=best_device(), help="the best that is here unless said otherwise")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    device = torch.device(arguments.device)
    model = ByteModel.from_pretrained(arguments.model, device)
    config = model.config
    text = arguments.text.read_bytes()
    if len(text) < max(arguments.context, arguments.prompt_length):
        sys.exit(f"{arguments.text} has {len(text)} bytes; a context of {arguments.context} needs as many")
    tokens = torch.tensor([list(text[: arguments.context])], device=device)
    prompt = torch.tensor([list(text[: arguments.prompt_length])], device=device)
    capacity = max(arguments.context, arguments.prompt_length + arguments.generate)
    f16_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * capacity

    def dense() -> Cache:
        return DenseCache(config, capacity, device, torch.float32)

    makers: list[Callable[[], Cache]] = [dense]
    makers += [partial(CompressedCache, config, capacity, formats) for formats in arguments.formats]
    print(f"Device: {device}")
    print(f"Prompt: the first {arguments.prompt_length} bytes of {arguments.text.name}, ending in:")
    print(text[: arguments.prompt_length][-300:].decode(errors="replace"))
    generate(model, dense(), prompt[:, :16], 8, 0.0, lambda _: None)  # warm up, so that the first row is not slower
    rows: list[dict[str, Any]] = []
    exact, expected = torch.empty(0), list[int]()
    for make in makers:
        cache = make()
        print(f"\n--- {cache.name} ---")

        def show(piece: bytes) -> None:
            sys.stdout.write(piece.decode("latin-1"))
            sys.stdout.flush()

        generated, speed = generate(model, cache, prompt, arguments.generate, arguments.temperature, show)
        print()
        got = log_probabilities(model, tokens, make(), cache.name)
        if not rows:
            exact, expected = got, generated
        rows.append(
            {
                "cache": cache.name,
                "nbytes": cache.nbytes,
                "share_of_f16": cache.nbytes / f16_bytes,
                "tokens_per_second": speed,
                "agreement": leading_agreement(generated, expected),
                "generated": len(generated),
                **compare(tokens, got, exact),
            }
        )
    sizes = f"{config.num_hidden_layers} layers, {config.num_key_value_heads} KV heads of {config.head_dim}"
    print(f"\nCapacity {capacity}, {sizes}; {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(rows))
    if arguments.json:
        environment = {
            "machine": platform.machine(),
            "system": platform.system(),
            "torch": torch.__version__,
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        settings = {"context": arguments.context, "prompt_length": arguments.prompt_length, "capacity": capacity}
        arguments.json.write_text(json.dumps({**environment, **settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
