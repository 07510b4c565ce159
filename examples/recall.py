"""Long-range recall: documents with planted facts and, further on, questions about them."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from byte_model import ByteModel

DIGITS = 4


class Answer(NamedTuple):
    """Bytes start .. end - 1 of a document answer a question about a fact whose digits lie `distance` bytes earlier."""

    start: int
    end: int
    distance: int


def random_word(rng: random.Random) -> str:
    """A pronounceable word of two to four syllables."""
    return "".join(rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def recall_document(
    rng: random.Random, length: int, filler: bytes, pairs: int | None = None
) -> tuple[bytes, list[Answer]]:
    """A document of exactly `length` bytes: pieces of filler, planted facts, and a question about each of them.

    The distances from fact to question are spread evenly on a logarithmic scale. `pairs` is the number of facts,
    by default a random number up to one per 128 bytes; a question that no longer fits is left out.
    """
    words = sorted({random_word(rng) for _ in range(pairs or rng.randint(1, max(1, length // 128)))})
    events: list[tuple[int, str, bool]] = []
    for word in words:
        question = rng.randint(min(128, length), length)
        distance = int(math.exp(rng.uniform(math.log(64), math.log(max(question, 64)))))
        events += [(question - distance, word, False), (question, word, True)]

    document = bytearray()
    codes: dict[str, tuple[str, int]] = {}
    answers: list[Answer] = []
    cursor = rng.randrange(max(1, len(filler) - length))
    for target, word, is_question in sorted(events):
        if target > len(document):
            piece = filler[cursor : cursor + target - len(document)]
            # Facts and questions stand between words of the filler, not inside them.
            piece = piece[: piece.rfind(b" ") + 1]
            document += piece
            cursor += len(piece)
        code = codes[word][0] if is_question else "".join(rng.choice("0123456789") for _ in range(DIGITS))
        before, after = (
            (f"\nwhat is the code of {word}? ", "\n") if is_question else (f"\nthe code of {word} is ", ".\n")
        )
        start = len(document) + len(before)
        if start + DIGITS + len(after) > length:
            break
        document += (before + code + after).encode()
        if is_question:
            answers.append(Answer(start, start + DIGITS, start - codes[word][1]))
        else:
            codes[word] = (code, start)
    document += filler[cursor : cursor + length - len(document)]
    # Filler that is too short for the document is padded with newlines.
    return bytes(document).ljust(length, b"\n"), answers


@torch.no_grad()
def recall_accuracy(
    model: ByteModel,
    documents: Sequence[tuple[bytes, list[Answer]]],
    edges: Sequence[int] = (256, 512, 1024, 2048, 4096),
) -> dict[int, tuple[int, int]]:
    """Questions answered and asked, by distance: {upper edge: (all digits right, asked)}.

    An answer counts as right if the model, shown the document up to each digit, ranks that digit first.
    """
    device = next(model.parameters()).device
    counts = {edge: [0, 0] for edge in edges}
    for document, answers in documents:
        tokens = torch.tensor(list(document), device=device)
        predicted = model(tokens[None, :-1])[0].argmax(-1)
        right = (predicted == tokens[1:]).tolist()
        for answer in answers:
            edge = next(edge for edge in edges if answer.distance <= edge)
            counts[edge][0] += all(right[answer.start - 1 : answer.end - 1])
            counts[edge][1] += 1
    return {edge: (correct, asked) for edge, (correct, asked) in counts.items()}
