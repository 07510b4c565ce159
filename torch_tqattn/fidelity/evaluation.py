"""Everything that is measured of some candidates on one model, and on difficult heads."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from .candidates import VIEWS, Candidate, Storage, View
from .extra import require
from .heads import Head, HeadError, difficult_heads, head_errors
from .measure import Comparison, compare, compare_candidate, summarise
from .models import Model, Text, cut
from .recall import Answer, in_tokens, recall_accuracy, recall_document

Document = tuple[list[int], list[Answer]]


def evaluate(
    model: Model,
    text: bytes,
    candidates: Sequence[Candidate],
    *,
    context: int = 1024,
    windows: int = 3,
    recall: int = 0,
    recall_length: int | None = None,
    heads: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that `eval` measures, as it stands in its JSON file: "layers", "exact" and "rows", one a candidate.

    Args:
        model, text, context, windows: as for `models.cut`.
        candidates: what to measure, each under a name of its own; see `candidates.parse`.
        recall, recall_length: how many documents with planted facts, and their tokens (as many as the context).
        heads: whether to measure the synthetic heads too, which a candidate that differs by layer cannot hold.
        seed: of those documents, and of the synthetic heads.

    Raises:
        ValueError: the text is too short, or a candidate cannot hold the model's heads.
    """
    texts = cut(model, text, context, windows)
    shapes = model.all_shapes()
    sizes = [candidate.bytes_per_token(shapes) for candidate in candidates]  # what does not fit is reported here
    documents = [recall_tokens(model, text, recall_length or context, seed + i) for i in range(recall)]
    difficult = list(difficult_heads(seed)) if heads else []
    for_heads = {c.name: c.storage for c in candidates if c.storage is not None}
    passes = [(c, view) for c in candidates for view in VIEWS if view == "coded" or c.has_tail]
    total = windows * (1 + len(passes)) + recall * (1 + len(candidates)) + len(difficult) * len(for_heads)
    with require("tqdm").tqdm(total=total, unit="pass", dynamic_ncols=True) as bar:
        exact, measured = measure_texts(model, texts, passes, bar)
        exact_recall = measure_recall(model, documents, None, bar)
        recall_of = {c.name: measure_recall(model, documents, c, bar) for c in candidates}
        errors = measure_heads(difficult, for_heads, bar)
    kv_heads = sum(count for count, _ in shapes.values())
    numbers = sum(2 * count * head_dim for count, head_dim in shapes.values())
    rows = []
    for candidate, nbytes in zip(candidates, sizes, strict=True):
        coded = summarise(measured[candidate.name, "coded"])
        loop = summarise(measured[candidate.name, "loop"]) if candidate.has_tail else coded
        rows.append(
            {
                "cache": candidate.name,
                "peer": candidate.is_peer,
                "bytes_per_token": nbytes,
                "bytes_per_head": nbytes / kv_heads,
                "bits_per_number": 8 * nbytes / numbers,
                "coded": asdict(coded),
                "loop": asdict(loop),
                "recall": recall_of[candidate.name],
                "heads": {name: asdict(error) for name, error in errors.get(candidate.name, {}).items()},
            }
        )
    return {
        "layers": [{"layer": i, "kv_heads": count, "head_dim": head_dim} for i, (count, head_dim) in shapes.items()],
        "exact": {"bits_per_byte": summarise(exact).bits_per_byte, "recall": exact_recall},
        "rows": rows,
    }


def measure_texts(
    model: Model, texts: Sequence[Text], passes: Sequence[tuple[Candidate, View]], bar: Any
) -> tuple[list[Comparison], dict[tuple[str, View], list[Comparison]]]:
    """The exact model compared with itself, and each pass with it; texts outermost, so that one's logits are kept."""
    exact: list[Comparison] = []
    measured: dict[tuple[str, View], list[Comparison]] = {(c.name, view): [] for c, view in passes}
    for text in texts:
        bar.set_description("exact")
        logits = model.exact_logits(text)
        exact.append(compare(logits, logits, text))
        bar.update()
        for candidate, view in passes:
            bar.set_description(candidate.name)
            measured[candidate.name, view].append(compare_candidate(model, text, candidate, view))
            bar.update()
    return exact, measured


def measure_recall(
    model: Model, documents: Sequence[Document], candidate: Candidate | None, bar: Any
) -> dict[int, tuple[int, int]]:
    """Questions answered and asked, by distance, in a decode loop; with no candidate, by the model itself."""
    bar.set_description(f"recall {candidate.name if candidate else 'exact'}")
    substitute = candidate.substitute("loop") if candidate else None

    def logits(tokens: Tensor) -> Tensor:
        bar.update()
        return model.logits(tokens.to(model.device), substitute)

    return recall_accuracy(logits, documents)


def measure_heads(heads: Sequence[Head], storages: Mapping[str, Storage], bar: Any) -> dict[str, dict[str, HeadError]]:
    """{candidate: {head: error}}"""
    errors: dict[str, dict[str, HeadError]] = {name: {} for name in storages}
    for head in heads:
        bar.set_description(head.name)
        found = head_errors(head, list(storages.values()), bar.update)
        for name, error in zip(storages, found, strict=True):
            errors[name][head.name] = error
    return errors


def recall_tokens(model: Model, text: bytes, length: int, seed: int) -> Document:
    """A document with planted facts, at most `length` tokens of the model, with the text as filler."""
    sample = text[: 1 << 16]
    bytes_per_token = len(sample) / len(model.encode(sample)[0])
    document, answers = recall_document(random.Random(seed), round(length * bytes_per_token), text)
    tokens, answers = in_tokens(document, answers, lambda piece: model.encode(piece)[0], model.prefix)
    return tokens[:length], [answer for answer in answers if answer.end <= length]
