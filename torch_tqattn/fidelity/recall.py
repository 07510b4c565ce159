"""Long-range recall: documents with planted facts and, further on, questions about them."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = 4
NEAREST = 256  # distances up to this are counted together


class Answer(NamedTuple):
    """Bytes (or tokens) start .. end - 1 of a document answer a question about a fact `distance` of them earlier."""

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


def in_tokens(
    document: bytes, answers: Sequence[Answer], encode: Callable[[bytes], list[int]], prefix: Sequence[int] = ()
) -> tuple[list[int], list[Answer]]:
    """A document, after the tokens `prefix`, and its answers in tokens.

    Facts and answers are encoded apart from what is around them, so that they begin and end where tokens do.
    """
    cuts = {0, len(document)}
    for answer in answers:
        fact = answer.start - answer.distance
        cuts |= {fact, fact + DIGITS, answer.start, answer.end}
    tokens = list(prefix)
    positions = {0: len(tokens)}
    for begin, end in itertools.pairwise(sorted(cuts)):
        tokens += encode(document[begin:end])
        positions[end] = len(tokens)
    moved = []
    for start, end, distance in answers:
        moved.append(Answer(positions[start], positions[end], positions[start] - positions[start - distance]))
    return tokens, moved


def recall_accuracy(
    logits: Callable[[Tensor], Tensor], documents: Sequence[tuple[Sequence[int], list[Answer]]]
) -> dict[int, tuple[int, int]]:
    """Questions answered and asked, by distance: {upper edge: (all digits right, asked)}, edges that occur only.

    An answer counts as right if the model, shown the document up to each of its tokens, ranks that token first.
    `logits` maps tokens [1, T] to [T, vocab].
    """
    counts: dict[int, list[int]] = {}
    for document, answers in documents:
        tokens = torch.tensor([list(document)])
        predicted = logits(tokens[:, :-1]).argmax(-1).cpu()
        right = (predicted == tokens[0, 1:]).tolist()
        for answer in answers:
            edge = max(NEAREST, 1 << (answer.distance - 1).bit_length())
            count = counts.setdefault(edge, [0, 0])
            count[0] += all(right[answer.start - 1 : answer.end - 1])
            count[1] += 1
    return {edge: (counts[edge][0], counts[edge][1]) for edge in sorted(counts)}
