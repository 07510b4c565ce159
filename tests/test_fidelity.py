"""What the format does to a trained model: KL divergence of the logits of the project's byte model."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import ByteModel
from torch import Tensor

import torch_tqattn as tq

MODEL = Path(__file__).parent.parent / "examples" / "model"
# Text at three places: a single one moves by several per cent.
PLACES = (0, 30_000, 82_000)
CONTEXT = 1024
OFFSET_CHANNELS = [3, 20, 77, 101]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> ByteModel:
    return ByteModel.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    text = (MODEL / "heldout.txt").read_bytes()
    return [torch.tensor([list(text[begin : begin + CONTEXT])]) for begin in PLACES]


def divergence(
    model: ByteModel, texts: list[Tensor], k_format: str, v_format: str, *, offset: float = 0.0, **options: Any
) -> float:
    """Mean KL divergence, in nats, of the logits when every key and value is read from the cache.

    The whole text is appended before the first query, so that nothing but the last block is dense. `offset` is added to
    four channels of every key, in units of the mean norm of keys: softmax does not see it.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = tq.KVCache(1, k.shape[1], k.shape[3], CONTEXT, k_format, v_format, **options)
        shifted = k.clone()
        shifted[..., OFFSET_CHANNELS] += offset * k.norm(dim=-1).mean()
        cache.append(shifted, v)
        return tq.attention(q, cache)

    total = 0.0
    for tokens in texts:
        exact = model(tokens).double().log_softmax(-1)
        got = model(tokens, attend).double().log_softmax(-1)
        total += (exact.exp() * (exact - got)).sum(-1).mean().item()
    return total / len(texts)


def test_the_model_knows_the_text(model: ByteModel, texts: list[Tensor]) -> None:
    logits = torch.cat([model(t)[0, :-1] for t in texts])
    bits = torch.nn.functional.cross_entropy(logits, torch.cat([t[0, 1:] for t in texts])) / torch.log(
        torch.tensor(2.0)
    )
    assert bits < 1.7  # its card says 1.47 over all of the text; 5.0 is what byte frequencies alone give


def test_dense_half_precision_changes_nothing(model: ByteModel, texts: list[Tensor]) -> None:
    assert divergence(model, texts, "f16", "f16") < 1e-6


def test_blocks_halve_the_divergence_of_plain_codes(model: ByteModel, texts: list[Tensor]) -> None:
    plain = divergence(model, texts, "tq4", "tq4", block_size=0, encode="plain", sink_length=0)
    corrected = divergence(model, texts, "tq4", "tq4", block_size=0, sink_length=0)
    blocks = divergence(model, texts, "tq4", "tq4", sink_length=0)
    assert corrected < 0.9 * plain
    assert blocks < 0.5 * plain


def test_best_codes_diverge_less(model: ByteModel, texts: list[Tensor]) -> None:
    assert divergence(model, texts, "tq4", "tq4", encode="best") < 0.9 * divergence(model, texts, "tq4", "tq4")


def test_a_constant_offset_of_keys_costs_nothing(model: ByteModel, texts: list[Tensor]) -> None:
    blocks = divergence(model, texts, "tq4", "tq4")
    assert divergence(model, texts, "tq4", "tq4", offset=4.0) < 1.1 * blocks
    assert divergence(model, texts, "tq4", "tq4", offset=4.0, block_size=0) > 10 * blocks  # what it would cost


def test_more_bits_diverge_less(model: ByteModel, texts: list[Tensor]) -> None:
    results = [divergence(model, texts, name, name) for name in ("tq2", "tq3", "tq4", "tq5", "tq6", "tq8")]
    assert results == sorted(results, reverse=True)
    assert results[-1] < 1e-4


def test_a_prompt_gives_what_single_tokens_give(model: ByteModel, texts: list[Tensor]) -> None:
    def logits(cuts: list[int]) -> Tensor:
        sizes = model.config
        heads = (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim, CONTEXT)
        layers = [tq.TQAttention(*heads, "tq4", "tq4") for _ in range(sizes.num_hidden_layers)]
        parts = []
        for begin, end in itertools.pairwise(cuts):
            part = model(texts[0][:, begin:end], lambda layer, q, k, v: layers[layer](q, k, v), begin)
            parts.append(part)
        return torch.cat(parts, dim=1)

    whole = logits([0, 400])
    single = logits(list(range(401)))
    # Not bitwise: the model's own matrix products round differently, which may move a coordinate across a threshold.
    divergence = (whole.softmax(-1) * (whole.log_softmax(-1) - single.log_softmax(-1))).sum(-1)
    assert divergence.mean() < 1e-5
