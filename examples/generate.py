"""Text from any Hugging Face causal language model with a compressed cache, beside the stock cache.

    python examples/generate.py                                        # the project's byte model; needs no network
    python examples/generate.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Once upon a time" --k-format tq4
    python examples/generate.py --model NAME --prompt-file long.txt --device mps --dtype float16

Greedy. It streams the text of each cache, then prints a table: tokens a second of the prompt and of the answer, the
cache's bytes, and how far the compressed cache says what the stock cache says: leading tokens of the answer that are
the same, and, given the stock answer so far, how often its next token is the same.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, TextStreamer

from torch_tqattn.integrations.transformers import TurboQuantCache

BYTE_MODEL = Path(__file__).resolve().parent / "model"


class ByteTokenizer:
    """For a model whose tokens are bytes: what `TextStreamer` and this program need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Tensor | list[int], **kwargs: Any) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")


class Clock(TextStreamer):
    """Shows the text as it comes, and notes when its tokens came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        super().put(value)
        if not self.next_tokens_are_prompt and value.numel() == 1:
            self.times.append(time.perf_counter())


@dataclass
class Row:
    """One line of the table."""

    cache: str
    nbytes: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    leading: int  # tokens of the answer that are the stock cache's, from its beginning
    same: float  # share of next tokens that are the stock cache's, given its answer so far


def nbytes_of(cache: DynamicCache) -> int:
    if isinstance(cache, TurboQuantCache):
        return cache.nbytes
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() == 4]
    return sum(x.numel() * x.element_size() for x in tensors)


def answer(model: PreTrainedModel, tokenizer: Any, prompt: Tensor, tokens: int, cache: DynamicCache) -> tuple[Any, ...]:
    """The new tokens [n], and the tokens a second of the prompt and of the answer."""
    clock = Clock(tokenizer)
    begin = time.perf_counter()
    mask = torch.ones_like(prompt)
    generate: Any = model.generate
    done = generate(
        prompt,
        attention_mask=mask,
        past_key_values=cache,
        streamer=clock,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    first, last = clock.times[0], clock.times[-1]
    speed = (len(clock.times) - 1) / (last - first) if last > first else float("nan")
    return done[0, prompt.shape[1] :].cpu(), prompt.shape[1] / (first - begin), speed


def next_tokens(model: PreTrainedModel, prompt: Tensor, given: Tensor, cache: DynamicCache) -> Tensor:
    """The most likely token after the prompt and after each but the last of the `given` tokens."""
    best = [model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()]
    for token in given[:-1].to(prompt.device):
        best.append(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1].argmax())
    return torch.stack(best).cpu()


def leading_agreement(first: Tensor, second: Tensor) -> int:
    length = min(len(first), len(second))
    return int((first[:length] == second[:length]).long().cumprod(0).sum())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BYTE_MODEL), help="name on the Hugging Face hub, or a directory")
    parser.add_argument("--prompt", help="text to go on from; a part of the held-out text for the byte model")
    parser.add_argument("--prompt-file", type=Path, help="a file with that text")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--k-format", default="tq8")
    parser.add_argument("--v-format", default="tq4")
    parser.add_argument("--prefill", default="exact", choices=("exact", "stepwise"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_grad_enabled(False)
    is_byte_model = arguments.model == str(BYTE_MODEL)
    tokenizer: Any = ByteTokenizer() if is_byte_model else AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    text = arguments.prompt or "Once upon a time"
    if arguments.prompt_file:
        text = arguments.prompt_file.read_text()
    elif is_byte_model and not arguments.prompt:
        text = (BYTE_MODEL / "heldout.txt").read_text()[:1024]
    prompt = torch.tensor([tokenizer.encode(text)], device=arguments.device)

    def compressed() -> TurboQuantCache:
        return TurboQuantCache(model.config, arguments.k_format, arguments.v_format, prefill=arguments.prefill)

    print(f"Prompt, {prompt.shape[1]} tokens, ending in:\n{text[-300:]}")
    rows, stock = [], torch.empty(0)
    for name, attention in (("stock", "sdpa"), (f"{arguments.k_format}/{arguments.v_format}", "tqattn")):
        model.set_attn_implementation(attention)
        model.generate(prompt[:, :8], attention_mask=torch.ones_like(prompt[:, :8]), max_new_tokens=2, pad_token_id=0)
        cache: DynamicCache = DynamicCache(config=model.config) if name == "stock" else compressed()
        print(f"\n--- {name} ---")
        tokens, prompt_speed, speed = answer(model, tokenizer, prompt, arguments.max_new_tokens, cache)
        if name == "stock":
            stock, same = tokens, 1.0
        else:
            same = float((next_tokens(model, prompt, stock, compressed()) == stock).float().mean())
        rows.append(Row(name, nbytes_of(cache), prompt_speed, speed, leading_agreement(tokens, stock), same))
    print(f"\n{model.config.model_type}, {arguments.dtype}, {prompt.shape[1]} + {len(stock)} tokens")
    print(f"{'cache':10}{'bytes':>12}{'prompt tok/s':>14}{'tok/s':>8}{'same tokens first':>19}{'same next token':>17}")
    for row in rows:
        print(
            f"{row.cache:10}{row.nbytes:12}{row.prompt_tokens_per_second:14.0f}{row.tokens_per_second:8.1f}"
            f"{row.leading:12} of {len(stock):3}{row.same:17.2%}"
        )
    if arguments.json:
        content = {"model": arguments.model, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
