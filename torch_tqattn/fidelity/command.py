"""`python -m torch_tqattn eval`: what cache formats do to a model, beside what others store, and on difficult heads."""

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import format as fmt
from . import report
from .candidates import Candidate, parse
from .evaluation import evaluate
from .models import HuggingFaceModel, Model
from .plan import Plan

DEFAULT_FORMATS = (
    *("f16", "tq8", "tq8/tq4", "tq6", "tq5", "tq4", "tq3", "tq2", "tq4:plain"),
    *("q8_0", "q4_0", "q4_0-hadamard", "affine4", "kivi4"),
)
# Where the project's own model is: beside the working directory, or in the checkout that this package lies in.
MODEL_PLACES = tuple(root / "examples" / "model" for root in (Path.cwd(), Path(__file__).resolve().parents[2]))
HELDOUT = "heldout.txt"
PLAN = "plan:"  # before the file of a plan, in --formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description = __doc__
    parser.add_argument(
        "--formats",
        nargs="+",
        default=DEFAULT_FORMATS,
        metavar="K/V[:OPTIONS]",
        help="what to measure, such as tq8/tq4, tq4:plain, tq4:block_size=64,residual_length=128, plan:FILE, q8_0 or "
        f"q4_0-hadamard; by default {' '.join(DEFAULT_FORMATS)}",
    )
    add_model_arguments(parser, context=1024, windows=3)
    parser.add_argument("--recall", type=int, default=2, metavar="N", help="documents with planted facts (2; 0: none)")
    parser.add_argument("--recall-length", type=int, metavar="TOKENS", help="their length (that of a window)")
    parser.add_argument("--heads", action="store_true", help="also print the errors on synthetic heads")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--plot", type=Path, help="draw KL divergence against bytes a token here (.png, .svg, .pdf)")
    parser.add_argument("--seed", type=int, default=0, help="of the recall documents and of the synthetic heads (0)")


def add_model_arguments(parser: argparse.ArgumentParser, context: int, windows: int) -> None:
    """Options of every command that runs a model on a text, with these defaults."""
    parser.add_argument("--model", help="directory or Hugging Face name of a causal LM (the project's small model)")
    parser.add_argument("--text", type=Path, help=f"text file to predict (the model's {HELDOUT})")
    parser.add_argument("--context", type=int, default=context, help=f"tokens of a window of text ({context})")
    parser.add_argument(
        "--windows", type=int, default=windows, help=f"windows, spread evenly over the text ({windows})"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="the model's type (float32)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print, draw and write what was asked for; ValueError or OSError if it cannot be done."""
    candidates = [candidate(spec) for spec in dict.fromkeys(arguments.formats)]
    model, text = load_model_and_text(arguments)
    result = {
        "settings": {
            "model": model.name,
            "text_bytes": len(text),
            "context": arguments.context,
            "windows": arguments.windows,
            "recall_documents": arguments.recall,
            "recall_length": arguments.recall_length or arguments.context,
            "dtype": arguments.dtype,
            "seed": arguments.seed,
        },
        "environment": environment(model),
        **evaluate(
            model,
            text,
            candidates,
            context=arguments.context,
            windows=arguments.windows,
            recall=arguments.recall,
            recall_length=arguments.recall_length,
            heads=arguments.heads or arguments.json is not None,
            seed=arguments.seed,
        ),
    }
    print(report.table(result))
    if arguments.heads:
        print("\n" + report.heads_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        report.plot(result, arguments.plot)


def candidate(spec: str) -> Candidate:
    """What a word of --formats stands for: a plan in a file, or what `parse` says."""
    if spec.startswith(PLAN):
        return Plan.load(spec.removeprefix(PLAN)).candidate(spec)
    return parse(spec)


def load_model_and_text(arguments: argparse.Namespace) -> tuple[Model, bytes]:
    """What the options of `add_model_arguments` name."""
    path = arguments.model or default_model()
    text = (arguments.text or default_text(path)).read_bytes()
    return HuggingFaceModel.load(str(path), arguments.device, arguments.dtype), text


def default_model() -> Path:
    """The project's small model; ValueError if it is not here."""
    for place in MODEL_PLACES:
        if (place / "config.json").exists():
            return place
    raise ValueError("give --model: the directory or Hugging Face name of a causal language model")


def default_text(model: str | Path) -> Path:
    """The text that comes with a model, else with the project's; ValueError if there is none."""
    for place in (Path(model), *MODEL_PLACES):
        if (place / HELDOUT).exists():
            return place / HELDOUT
    raise ValueError("give --text: a text file for the model to predict")


def environment(model: Model) -> dict[str, Any]:
    """What a result may depend on besides its settings."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "format_version": fmt.FORMAT_VERSION,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }
