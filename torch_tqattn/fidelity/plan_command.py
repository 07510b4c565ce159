"""`python -m torch_tqattn plan`: choose each layer's formats for a budget of bytes, and compare the choice."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from .candidates import Candidate, parse
from .command import add_model_arguments, load_model_and_text
from .extra import require
from .measure import divergence
from .models import Model, Text, cut
from .plan import DEFAULT_FORMATS, Plan, plan
from .report import aligned

# A uniform pair is compared if it takes more than this share of the budget.
NEAR = 0.9

Measured = tuple[str, float, float]  # a cache, its bytes a token, and its divergence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description = __doc__
    add_model_arguments(parser, context=512, windows=2)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=float, metavar="BYTES", help="of one token in all layers and KV heads")
    budget.add_argument("--like", metavar="K/V[:OPTIONS]", help="what this takes in every layer, such as tq4 or q8_0")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=DEFAULT_FORMATS,
        metavar="FORMAT",
        help=f"formats to choose from ({' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument("--no-balance", action="store_true", help="leave the channels of keys as they are")
    parser.add_argument("--encode", default="fast", help="how caches that follow the plan encode: fast or best (fast)")
    parser.add_argument("--out", type=Path, required=True, help="write the plan here, as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Make the plan, write it, and compare it; ValueError or OSError if it cannot be done."""
    like = parse(arguments.like) if arguments.like else None
    model, text = load_model_and_text(arguments)
    # Half of the windows make the plan and the others judge it: it should not be praised for knowing its texts.
    texts = cut(model, text, arguments.context, 2 * arguments.windows)
    budget = arguments.budget if like is None else like.bytes_per_token(model.all_shapes())
    with require("tqdm").tqdm(unit="pass", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = plan(
            model,
            texts[::2],
            budget,
            formats=arguments.formats,
            balance=not arguments.no_balance,
            progress=progress,
            encode=arguments.encode,
        )
    found.save(arguments.out)
    pairs = uniform_pairs(model, arguments.formats, budget, arguments.encode)
    measured = measure(model, texts[1::2], [found.candidate(), *pairs])
    print(table(found, model.all_shapes()))
    print(f"\n{verdict(measured, budget)}")


def uniform_pairs(model: Model, formats: Sequence[str], budget: float, encode: str) -> list[Candidate]:
    """All pairs of formats that take at most the budget, the same in every layer, and nearly all of it."""
    names = itertools.product(dict.fromkeys(formats), repeat=2)
    pairs = [parse(f"{k}/{v}" + ("" if encode == "fast" else f":encode={encode}")) for k, v in names]
    return [pair for pair in pairs if NEAR * budget < pair.bytes_per_token(model.all_shapes()) <= budget]


def measure(model: Model, texts: Sequence[Text], candidates: Sequence[Candidate]) -> list[Measured]:
    """Each candidate's size and divergence on some texts."""
    shapes = model.all_shapes()
    measured = []
    for candidate in require("tqdm").tqdm(candidates, desc="comparing", unit="cache", dynamic_ncols=True):
        kld = divergence(model, texts, candidate, "coded").kld
        measured.append((candidate.name, candidate.bytes_per_token(shapes), kld))
    return measured


def table(found: Plan, shapes: Mapping[int, tuple[int, int]]) -> str:
    """One line a layer: its formats, its share of the bytes, and what it is expected to add to the divergence."""
    sizes = {i: found.candidate().bytes_per_layer(i, shapes[i]) for i in shapes}
    lines = [("layer", "K", "V", "bytes", "keys' KLD", "values' KLD")]
    for i, options in found.layers.items():
        share = f"{sizes[i] / found.bytes_per_token:.1%}"
        lines.append(
            (str(i), options["k_format"], options["v_format"], share, *(f"{x:.1e}" for x in found.predicted[i]))
        )
    expected = sum(map(sum, found.predicted.values()))
    balanced = sum("k_balance" in options for options in found.layers.values())
    size = f"{found.bytes_per_token:g} bytes a token"
    return "\n".join(
        (
            f"{found.model}: {size}; keys balanced in {balanced} of {len(shapes)} layers",
            f"KLD: predicted {expected:.2e}, measured {found.kld:.2e} on the texts that the plan was made on",
            "",
            aligned(lines),
        )
    )


def verdict(measured: Sequence[Measured], budget: float) -> str:
    """The plan, which comes first, and the uniform pairs, best first; and whether the plan is worth having."""
    plan_, *pairs = measured
    lines = [("in every layer", "bytes", "KLD")]
    lines += [(name, f"{nbytes:g}", f"{kld:.2e}") for name, nbytes, kld in sorted(measured, key=lambda row: row[2])]
    if not pairs:
        said = f"No pair of these formats takes between {NEAR:.0%} and all of {budget:g} bytes in every layer."
    else:
        name, _, kld = min(pairs, key=lambda row: row[2])
        ratio = plan_[2] / kld if kld else float("inf")
        said = (
            f"The plan's divergence is {ratio:.2f} times that of {name}, the best of them."
            if ratio < 1
            else f"{name} in every layer is better than this plan: its divergence is {1 / ratio:.2f} times the plan's."
        )
    return f"On other texts, all codes:\n\n{aligned(lines)}\n\n{said}"
