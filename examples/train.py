"""Trains the byte model on text files (plain, .gz or .xz) and writes its directory.

python examples/train.py --heldout examples/model/heldout.txt --output examples/model TEXT...
"""

import argparse
import gzip
import json
import lzma
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_model import ByteModel, ByteModelConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from torch_tqattn.fidelity.recall import recall_accuracy, recall_document


def read_text(path: Path) -> bytes:
    """The bytes of a text file, decompressed."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return lzma.decompress(data) if path.suffix == ".xz" else data


def without_lines(text: bytes, excluded: set[bytes]) -> bytes:
    """The text less each line that is in the excluded set."""
    return b"".join(line for line in text.splitlines(keepends=True) if line.strip() not in excluded)


def recall_batch(seed: int, filler: bytes, count: int, length: int) -> bytes:
    """`count` recall documents of `length` bytes each, one after the other."""
    rng = random.Random(seed)
    return b"".join(recall_document(rng, length, filler)[0] for _ in range(count))


def recall_documents(seed: int, text: bytes, count: int, length: int) -> Tensor:
    """uint8 [count, length]: recall documents with filler from the text, no two of them alike."""
    if count == 0:
        return torch.empty(0, length, dtype=torch.uint8)
    per_job, filler_size = 64, 1 << 20
    rng = random.Random(seed)
    starts = [rng.randrange(max(1, len(text) - filler_size)) for _ in range(math.ceil(count / per_job))]
    with ProcessPoolExecutor() as pool:
        make = partial(recall_batch, count=per_job, length=length)
        seeds = range(seed, seed + len(starts))
        jobs = pool.map(make, seeds, (text[start : start + filler_size] for start in starts))
        return torch.frombuffer(bytearray(b"".join(jobs)), dtype=torch.uint8).view(-1, length)[:count]


def text_windows(data: Tensor, count: int, length: int) -> Tensor:
    """[count, length]: windows at random places of data [N]."""
    starts = torch.randint(data.numel() - length, (count, 1), device=data.device)
    return data[starts + torch.arange(length, device=data.device)]


def initialise(model: ByteModel) -> None:
    """Normal weights, zero biases; the layers that write to the residual stream start smaller."""
    writers = ("o_proj.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = (2 * model.config.num_hidden_layers) ** -0.5 if name.endswith(writers) else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5 if "proj" in name else 0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def bits_per_byte(model: ByteModel, text: bytes, window: int) -> float:
    """Mean loss in bits over consecutive windows, each read without the text before it."""
    data = torch.tensor(list(text), device=next(model.parameters()).device)
    total = sum(
        functional.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
        for piece in (data[start : start + window + 1] for start in range(0, len(data) - 1, window))
    )
    return total / (len(data) - 1) / math.log(2)


def save(model: ByteModel, directory: Path) -> None:
    """Writes the weights as float16 and a config that transformers reads too."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **asdict(model.config),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="text files to train on: plain, .gz or .xz")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on; never trained on")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--stages", nargs="+", default=["1024:2000", "4096:8000"], help="LENGTH:STEPS of each stage")
    parser.add_argument("--batch-bytes", type=int, default=131072, help="bytes per step")
    parser.add_argument("--recall-documents", type=int, default=200, help="to measure recall on, at the end")
    parser.add_argument("--recall-share", type=float, default=0.125, help="share of recall documents")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rope-theta", type=float, default=ByteModelConfig.rope_theta)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    args = parser.parse_args()
    if args.compile is None:
        args.compile = args.device.startswith("cuda")
    return args


def adamw(model: ByteModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim == 2]},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)


def train(model: ByteModel, text: bytes, args: argparse.Namespace) -> None:
    """Trains the model in place, stage after stage, under one learning-rate schedule."""
    device = next(model.parameters()).device
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages]
    steps = sum(count for _, count in stages)
    optimizer = adamw(model, args.lr, args.weight_decay)
    schedule = partial(learning_rate_factor, steps=steps, warmup=min(200, steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    compiled_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    with tqdm(total=steps, mininterval=5) as bar:
        for stage, (length, count) in enumerate(stages):
            sequences = max(1, args.batch_bytes // length)
            recalled = round(sequences * args.recall_share)
            seed = args.seed + (stage + 1) * 1_000_000
            documents = recall_documents(seed, text, count * recalled, length + 1).to(device)
            for step in range(count):
                recall = documents[step * recalled : (step + 1) * recalled]
                tokens = torch.cat((text_windows(data, sequences - recalled, length + 1), recall)).long()
                loss = compiled_loss(tokens)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
                bar.update()
                if bar.n % 100 == 0:
                    bar.set_postfix(length=length, bits=f"{loss.item() / math.log(2):.3f}")


def report(model: ByteModel, heldout: bytes, seed: int, documents: int) -> None:
    """Prints the loss on held-out text and the recall by distance, with that text as filler."""
    length = model.config.max_position_embeddings
    print(f"{bits_per_byte(model, heldout, length):.4f} bits per byte on held-out text")
    device = next(model.parameters()).device
    rng = random.Random(seed)
    texts = [recall_document(rng, length, heldout) for _ in range(documents)]
    for edge, (right, asked) in recall_accuracy(lambda tokens: model(tokens.to(device))[0], texts).items():
        print(f"recall at distances up to {edge}: {right}/{asked}")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    heldout = read_text(args.heldout)
    # Blank and very short lines are everywhere, and leaving them out would only break up the training text.
    excluded = {line.strip() for line in heldout.splitlines() if len(line.strip()) >= 24}
    text = b"".join(without_lines(read_text(path), excluded) for path in args.texts)
    model = ByteModel(ByteModelConfig(rope_theta=args.rope_theta)).to(args.device)
    initialise(model)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(text):,} bytes of text")

    started = time.monotonic()
    train(model, text, args)
    print(f"trained for {time.monotonic() - started:.0f} s")
    save(model, args.output)
    report(ByteModel.from_pretrained(args.output, args.device), heldout, args.seed, args.recall_documents)


if __name__ == "__main__":
    main()
