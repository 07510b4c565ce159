"""The fidelity instrument: its peers, its views, its models, its report, and its command."""

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import ByteModel
from torch import Tensor
from torch.nn import functional

import torch_tqattn as tq
from torch_tqattn.__main__ import main
from torch_tqattn.fidelity import (
    CallableModel,
    HuggingFaceModel,
    Part,
    Text,
    cut,
    difficult_heads,
    divergence,
    evaluate,
    head_errors,
    parse,
    peers,
    per_layer,
    report,
)
from torch_tqattn.fidelity.candidates import Compressed
from torch_tqattn.fidelity.extra import require
from torch_tqattn.fidelity.measure import compare, summarise
from torch_tqattn.fidelity.models import causal_mask
from torch_tqattn.fidelity.recall import Answer, in_tokens, recall_accuracy, recall_document

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "model"
HALF = 2.0**-11  # the largest relative error of a number in half precision


@pytest.fixture(scope="module")
def byte_model() -> ByteModel:
    return ByteModel.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def heldout() -> bytes:
    return (MODEL / "heldout.txt").read_bytes()


# Peers


def block(*numbers: float) -> Tensor:
    """One block of 32: these numbers, then zeros."""
    return torch.tensor([[*numbers, *[0.0] * (32 - len(numbers))]])


def test_q8_0_by_hand() -> None:
    # The largest magnitude is 127 steps, so the step is 1; halves are rounded away from zero.
    x = block(127.0, 1.4, -1.6, 2.5, -2.5)
    assert torch.equal(peers.q8_0(x), block(127, 1, -2, 3, -3))
    assert torch.equal(peers.q8_0(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_q4_0_by_hand() -> None:
    # The number of largest magnitude becomes -8 steps: with -8 the step is 1, and 7 is the largest code.
    assert torch.equal(peers.q4_0(block(-8.0, 7.9, 1.4, -1.6, 0.5)), block(-8, 7, 1, -2, 1))
    # With +4 it is -0.5: the codes of what is positive are negative.
    assert torch.equal(peers.q4_0(block(4.0, -4.0, 1.0)), block(4, -3.5, 1))
    assert torch.equal(peers.q4_0(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_affine_by_hand() -> None:
    x = torch.arange(64.0)[None] * 15 / 63 + 1  # 1 to 16: the step is 1
    got = peers.affine(x, 4)
    assert torch.equal(got, (x - 1).round() + 1)
    assert torch.equal(peers.affine(torch.full((1, 64), 3.0), 4), torch.full((1, 64), 3.0))


def test_hadamard_is_its_own_inverse_and_has_no_signs() -> None:
    x = torch.randn(3, 256)
    assert torch.allclose(peers.hadamard(peers.hadamard(x, 64), 64), x, atol=1e-5)
    assert torch.allclose(peers.hadamard(x, 256).norm(dim=-1), x.norm(dim=-1))
    first = torch.zeros(1, 64)
    first[0, 0] = 8.0
    assert torch.equal(peers.hadamard(first, 64), torch.ones(1, 64))
    assert [peers.key_rotation(d) for d in (64, 128, 192, 256)] == [64, 128, 64, 256]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_peers_err_by_half_a_step(scale: float) -> None:
    x = torch.randn(50, 128) * scale
    by_32 = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)
    assert ((peers.q8_0(x) - x).abs() <= by_32 * (0.5 / 127 + 1.1 * HALF)).all()
    # What lies opposite to the largest is cut off at 7 of 8 steps.
    assert ((peers.q4_0(x) - x).abs() <= by_32 * (1 / 8 + 1.1 * HALF)).all()
    groups = x.unflatten(-1, (-1, 64))
    step = ((groups.amax(-1) - groups.amin(-1)) / 15)[..., None].expand(-1, -1, 64).flatten(-2)
    by_64 = groups.abs().amax(-1, keepdim=True).expand(-1, -1, 64).flatten(-2)
    assert ((peers.affine(x, 4) - x).abs() <= step * 0.5 + by_64 * 4 * HALF).all()


def test_channels_are_in_groups_of_tokens() -> None:
    """A constant of a channel costs its group of tokens nothing; what is left of a group is one of its own."""
    x = torch.rand(1, 100, 64)
    x[..., 3] += 100
    got = peers.affine_channels(x, 4)
    assert got.shape == x.shape
    assert ((got - x).abs() <= 0.5 / 15 + 101 * 2 * HALF).all()
    assert torch.equal(got[:, :64], peers.affine_channels(x[:, :64], 4))
    assert (peers.affine(x, 4) - x).abs().max() > 0.5


def test_values_are_rotated_in_runs_of_64() -> None:
    """As llama.cpp has it: a key's outlier is spread over the head, a value's over 64 numbers."""
    x = torch.randn(4, 128) * 0.01
    x[:, 0] = 100.0
    peer = peers.PEERS["q4_0-hadamard"]
    keys, values = ((quantise(x) - x)[:, 64:].abs().max() for quantise in (peer.keys, peer.values))
    assert values < 0.01
    assert keys > 10 * values


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("f16", 512.0),
        ("q8_0", 2 * 128 / 32 * 34),
        ("q4_0", 2 * 128 / 32 * 18),
        ("q4_0-hadamard", 2 * 128 / 32 * 18),
        ("q8_0/q4_0", 128 / 32 * (34 + 18)),
        ("affine4", 2 * (64 + 2 * 4)),
        ("kivi2", 2 * (32 + 2 * 4)),
        ("f16/q8_0", 256 + 128 / 32 * 34),
        ("tq4", 2 * (64 + 4 + 256 / 128)),
        ("tq4:block_size=64", 2 * (64 + 4 + 256 / 64)),
        ("tq4:plain", 2 * (64 + 4)),
        ("tq8/tq4", tq.bytes_per_token("tq8", "tq4", 128)),
    ],
)
def test_bytes_a_token(spec: str, expected: float) -> None:
    assert parse(spec).bytes_per_token({0: (1, 128)}) == expected
    assert parse(spec).bytes_per_token({0: (1, 128), 3: (2, 128)}) == 3 * expected


def test_heads_that_a_peer_does_not_fit() -> None:
    x = torch.zeros(1, 1, 4, 80)
    with pytest.raises(ValueError, match="head_dim 80 is not a multiple of 64"):
        parse("q4_0-hadamard").substitute("coded")(0, x, x, x)


# Specifications


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tq7", "unknown format 'tq7' in 'tq7'; choose one of f16, tq2.*to compare f16, q8_0, q4_0"),
        ("tq8/", "unknown format ''"),
        ("tq8/q4_0", "mixes formats of two projects"),
        ("tq4:size=3", r"unknown option 'size=3' in 'tq4:size=3'; choose from plain, block_size=\.\.\."),
        ("tq4:block_size", "unknown option 'block_size'"),
        ("tq4:k_balance=1", "unknown option 'k_balance=1'"),
        ("tq4:encode=worst", "unknown encode 'worst'"),
        ("tq4:block_size=-1", "block_size must be a non-negative integer"),
        ("q4_0:block_size=64", "block_size are options of KVCache, which q4_0 and q4_0 do not use"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_specs() -> None:
    candidate = parse("tq8/tq4:block_size=64,residual_length=32,encode=fast")
    assert candidate.name == "tq8/tq4:block_size=64,residual_length=32,encode=fast"
    assert candidate.storage.options == {"block_size": 64, "residual_length": 32, "encode": "fast"}
    assert candidate.has_tail
    assert not candidate.is_peer
    assert parse("tq4:plain").is_peer  # TurboQuant, but not this project's
    assert [parse(spec).has_tail for spec in ("f16", "tq4/f16", "tq4:block_size=0", "q4_0")] == [
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="unknown view 'raw'; choose one of coded, loop"):
        candidate.substitute("raw")


def test_layers_may_differ() -> None:
    candidate = per_layer(["tq4", "f16", "q8_0/f16"], "mixed")
    k, v = torch.randn(2, 1, 2, 200, 64).unbind()
    for layer, spec in enumerate(["tq4", "f16", "q8_0/f16"]):
        for got, expected in zip(
            candidate.substitute("loop")(layer, k, k, v), parse(spec).substitute("loop")(0, k, k, v), strict=True
        ):
            assert got.queries == expected.queries
            assert torch.equal(got.keys, expected.keys)
            assert torch.equal(got.values, expected.values)
    expected = sum(parse(spec).bytes_per_token({0: (2, 64)}) for spec in ("tq4", "f16", "q8_0/f16"))
    assert candidate.bytes_per_token({0: (2, 64), 1: (2, 64), 2: (2, 64)}) == expected


def test_options_may_be_tensors() -> None:
    """As a calibration finds them; a string cannot give them."""
    balance = torch.ones(2, 64)
    balance[:, 7] = 4.0
    k, v = torch.randn(2, 1, 2, 200, 64).unbind()
    plain, balanced = (
        Compressed("tq3", "f16", options).parts(k, v, "coded")[0].keys for options in ({}, {"k_balance": balance})
    )
    assert (balanced - k)[..., 7].norm() < 0.5 * (plain - k)[..., 7].norm()


# Views


def attend_to_parts(q: Tensor, parts: list[Part]) -> Tensor:
    outs = []
    for queries, keys, values in parts:
        mask = causal_mask(queries, q.device)
        rows = q[:, :, queries], keys, values
        outs.append(functional.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True))
    return torch.cat(outs, dim=2)


LOOPS = [
    ("tq4", {}),
    ("tq4:block_size=64", {"block_size": 64}),
    ("tq8/tq4:block_size=32,residual_length=50", {"block_size": 32, "residual_length": 50}),
    ("tq4:block_size=0", {"block_size": 0}),
    ("tq4:sink_length=40,block_size=32", {"sink_length": 40, "block_size": 32}),
    ("tq4:plain", {"block_size": 0, "encode": "plain", "sink_length": 0}),
    ("f16", {}),
    ("f16/tq3", {}),
]


@pytest.mark.parametrize(("spec", "options"), LOOPS, ids=[spec for spec, _ in LOOPS])
def test_the_loop_view_is_what_a_decode_loop_sees(spec: str, options: dict[str, int]) -> None:
    """One pass over all queries gives what TQAttention gives, token by token."""
    tokens, head_dim = 300, 64
    q, k, v = torch.randn(1, 4, tokens, head_dim), *torch.randn(2, 1, 2, tokens, head_dim).unbind()
    k[..., 5] += 20.0
    storage = parse(spec).storage
    loop = tq.TQAttention(4, 2, head_dim, tokens, storage.k_format, storage.v_format, **options)
    expected = torch.cat([loop(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(tokens)], dim=2)
    got = attend_to_parts(q, storage.parts(k, v, "loop"))
    assert torch.allclose(got, expected, atol=1e-4)
    if storage.has_tail:
        assert not torch.allclose(attend_to_parts(q, storage.parts(k, v, "coded")), expected, atol=1e-2)


def test_the_loop_view_of_a_model(byte_model: ByteModel, heldout: bytes) -> None:
    """The logits of one pass are those of a model that runs on TQAttention, token by token."""
    tokens = torch.tensor([list(heldout[:150])])
    sizes = byte_model.config
    heads = (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim, 150, "tq4", "tq4")
    layers = [tq.TQAttention(*heads, block_size=32) for _ in range(sizes.num_hidden_layers)]
    single = [byte_model(tokens[:, i : i + 1], lambda layer, q, k, v: layers[layer](q, k, v), i)[0] for i in range(150)]
    got = CallableModel(byte_model).logits(tokens, parse("tq4:block_size=32").substitute("loop"))
    # Not bitwise: the model's own matrix products round differently, which may move a coordinate across a threshold.
    text = Text(tokens, 149)
    assert summarise([compare(torch.cat(single), got, text)]).kld < 1e-5
    coded = CallableModel(byte_model).logits(tokens, parse("tq4:block_size=32").substitute("coded"))
    assert summarise([compare(torch.cat(single), coded, text)]).kld > 1e-4


def test_the_coded_view_reads_no_dense_row() -> None:
    """Positions of a block that has just begun are codes as well, around the mean of what there is of it."""
    k, v = torch.randn(2, 1, 1, 140, 64).unbind()
    ((queries, keys, _),) = parse("tq2").storage.parts(k, v, "coded")
    assert queries == slice(0, 140)
    errors = (keys - k).norm(dim=-1) / k.norm(dim=-1)
    assert (errors[0, 0, 8:] > 0.05).all()  # the first ones may be kept dense
    assert torch.equal(
        keys[:, :, 10:128], parse("tq2").storage.parts(k[:, :, :129], v[:, :, :129], "loop")[1].keys[:, :, 10:128]
    )


# Measures


def test_comparison_by_hand() -> None:
    exact = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    got = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log() + 3.0  # logits are free to be shifted
    result = compare(exact, got, Text(torch.tensor([[1, 0]]), 2))
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert result.divergence.tolist() == pytest.approx([expected, 0], abs=1e-7)
    assert result.same_top.tolist() == [True, True]
    assert result.bits == pytest.approx(-math.log2(0.75))
    metrics = summarise([result, result])
    assert metrics.kld == pytest.approx(expected / 2)
    assert metrics.bits_per_byte == pytest.approx(-math.log2(0.75) / 2)
    assert metrics.top1 == 1


def test_exact_logits_are_computed_once(heldout: bytes, byte_model: ByteModel) -> None:
    calls: list[int] = []

    def counting(tokens: Tensor, attend: Any) -> Tensor:
        calls.append(tokens.shape[1])
        return byte_model(tokens, attend)

    model = CallableModel(counting)
    texts = cut(model, heldout, 64, 2)
    first = divergence(model, texts, parse("tq4"), view="coded")
    assert len(calls) == 4
    assert divergence(model, texts, parse("tq8"), view="coded").kld < first.kld
    assert len(calls) == 6
    assert divergence(model, texts, parse("f16")).kld < 1e-6


def test_cut_spreads_windows(heldout: bytes, byte_model: ByteModel) -> None:
    model = CallableModel(byte_model)
    texts = cut(model, heldout, 100, 3)
    assert [bytes(t.tokens[0].tolist()) for t in texts] == [
        heldout[:100],
        heldout[(len(heldout) - 100) // 2 :][:100],
        heldout[-100:],
    ]
    assert [t.nbytes for t in texts] == [99] * 3
    with pytest.raises(ValueError, match="the text has 150 tokens, too few for 2 windows of 100"):
        cut(model, heldout[:150], 100, 2)
    with pytest.raises(ValueError, match="at least 1 window of at least 2 tokens"):
        cut(model, heldout, 1, 1)


# Hugging Face models

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "pad_token_id": 0,
}


def tiny(kind: str) -> HuggingFaceModel:
    transformers = pytest.importorskip("transformers")
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=20),
        "softcap": lambda: transformers.Gemma2Config(
            **SIZES, sliding_window=20, attn_logit_softcapping=0.5, query_pre_attn_scalar=4
        ),
        "sinks": lambda: transformers.GptOssConfig(
            **SIZES, sliding_window=20, num_local_experts=2, num_experts_per_tok=1
        ),
    }
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()
    for parameter in model.parameters():  # so that attention is far from uniform
        torch.nn.init.normal_(parameter, std=0.1)
    return HuggingFaceModel(model)


KINDS = ("llama", "sliding", "softcap", "sinks")


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_models_keep_their_attention(kind: str) -> None:
    """Parts made of a model's own keys and values give its own logits, whatever its attention does besides."""
    model = tiny(kind)
    tokens = torch.randint(256, (1, 90))
    own = model._model(tokens, use_cache=False).logits[0].float()
    usual = model._model.config._attn_implementation

    def whole(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        return [Part(slice(0, 90), k, v)]

    def pieces(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        edges = (0, 7, 64, 89, 90)
        return [Part(slice(a, b), k[:, :, :b], v[:, :, :b]) for a, b in itertools.pairwise(edges)]

    def nothing(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        return [Part(slice(0, 90), k, v * 0)]

    assert torch.allclose(model.logits(tokens), own, atol=1e-5)
    assert torch.allclose(model.logits(tokens, whole), own, atol=1e-4)
    assert torch.allclose(model.logits(tokens, pieces), own, atol=1e-4)
    assert not torch.allclose(model.logits(tokens, nothing), own, atol=1e-2)
    half = model.logits(tokens, parse("f16").substitute("loop"))
    assert (half - own).abs().max() < 0.02 * own.abs().max()
    assert model.shapes == {0: (2, 64), 1: (2, 64)}
    assert model._model.config._attn_implementation == usual


def test_the_projects_model_as_hugging_face_reads_it(byte_model: ByteModel, heldout: bytes) -> None:
    pytest.importorskip("transformers")
    model = HuggingFaceModel.load(str(MODEL))
    assert model.name == "examples/model"
    assert model.prefix == ()
    text = cut(model, heldout, 200, 1)[0]
    assert torch.allclose(model.exact_logits(text), byte_model(text.tokens)[0], atol=1e-3)
    for view in ("coded", "loop"):
        # At 8 bits, since both round differently, which may move a coordinate across a threshold.
        substitute = parse("tq8:block_size=64").substitute(view)
        expected = CallableModel(byte_model).logits(text.tokens, substitute)
        assert summarise([compare(expected, model.logits(text.tokens, substitute), text)]).kld < 1e-5


def test_models_that_cannot_be_read() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 300}))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no tokenizer, and its 300 tokens are not bytes"):
        HuggingFaceModel(model)
    gpt = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=1, vocab_size=256))
    with pytest.raises(ValueError, match="does not call an attention function"):
        HuggingFaceModel(gpt.eval()).logits(torch.tensor([[1, 2]]))


def tokenizer_of_bytes() -> Any:
    """A tokenizer with a few merges, whose texts begin with a token of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *alphabet, "th", "the"]
    bpe = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [("t", "h"), ("th", "e")])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_bits_are_counted_for_the_bytes_of_the_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of_bytes()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}))
    model = HuggingFaceModel(llama.eval(), tokenizer)
    assert model.prefix == (0,)
    text = "the caf\u00e9 then".encode()
    tokens, ends = model.encode(text)
    assert tokenizer.decode(tokens) == text.decode()
    assert ends[-1] == len(text)
    assert ends[0] == 3  # "the" is one token
    (piece,) = cut(model, text, len(tokens) + 1, 1)
    assert piece.tokens[0].tolist() == [0, *tokens]
    assert piece.nbytes == len(text)
    # The windows of a longer text follow each other: together they predict all of it.
    pieces = cut(model, text * 2, len(tokens) + 1, 2)
    assert [p.nbytes for p in pieces] == [len(text)] * 2
    assert pieces[1].tokens[0].tolist() == [0, *tokens]


# Recall


def test_documents_in_tokens() -> None:
    """Facts and answers keep their digits and their distance, whatever the tokens around them are."""
    filler = b"some words of the text that there are\n" * 100
    document, answers = recall_document(random.Random(3), 2000, filler, pairs=6)
    assert len(document) == 2000
    assert answers
    assert in_tokens(document, answers, list) == (list(document), answers)
    tokenizer = tokenizer_of_bytes()

    def encode(piece: bytes) -> list[int]:
        return tokenizer(piece.decode(), add_special_tokens=False).input_ids

    tokens, moved = in_tokens(document, answers, encode, prefix=(0,))
    assert len(tokens) < 2000
    assert tokens[0] == 0
    for before, after in zip(answers, moved, strict=True):
        assert tokenizer.decode(tokens[after.start : after.end]).encode() == document[before.start : before.end]
        fact = after.start - after.distance
        assert tokens[fact : fact + after.end - after.start] == tokens[after.start : after.end]
        assert after.distance < before.distance


def test_recall_counts_whole_answers_by_distance() -> None:
    document = list(range(100)) * 10

    def logits(tokens: Tensor) -> Tensor:
        """Knows what comes next, but for the token 55."""
        following = (tokens[0] + 1) % 100
        return functional.one_hot(torch.where(following == 55, 0, following), 100).float()

    answers = [Answer(310, 314, 300), Answer(350, 354, 20), Answer(452, 456, 256), Answer(953, 957, 900)]
    assert recall_accuracy(logits, [(document, answers)]) == {256: (1, 2), 512: (1, 1), 1024: (0, 1)}


# Synthetic heads


def test_difficult_heads() -> None:
    heads = {head.name: head for head in difficult_heads() if not head.name.startswith("16K")}
    assert {"gaussian", "offset", "outliers", "heavy tails", "tiny", "huge", "rope 1e4", "rope 5e5", "rope 1e6"} == set(
        heads
    )
    for name, again in zip(heads, difficult_heads(), strict=False):
        assert torch.equal(heads[name].k, again.k)
    assert heads["tiny"].k.norm(dim=-1).mean() == pytest.approx(1e-6, rel=0.1)
    assert heads["huge"].v.norm(dim=-1).mean() == pytest.approx(1e4, rel=0.1)
    specs = ("f16", "tq8", "tq4", "tq4:plain", "q4_0")
    storages = [parse(spec).storage for spec in specs]
    errors = {
        name: dict(zip(specs, head_errors(heads[name], storages), strict=True)) for name in ("gaussian", "offset")
    }
    for found in errors.values():
        assert found["f16"].kld < 1e-5
        assert found["f16"].kld < found["tq8"].kld < found["tq4"].kld
        assert found["tq8"].error < found["tq4"].error
    # A constant offset costs blocks nothing, and the others much.
    assert errors["offset"]["tq4"].kld < 1.2 * errors["gaussian"]["tq4"].kld
    assert errors["offset"]["tq4:plain"].kld > 5 * errors["offset"]["tq4"].kld
    assert errors["offset"]["q4_0"].kld > 5 * errors["offset"]["tq4"].kld


# The report


@pytest.fixture(scope="module")
def result(byte_model: ByteModel, heldout: bytes) -> dict[str, Any]:
    pytest.importorskip("tqdm")
    candidates = [parse(spec) for spec in ("tq4:block_size=32", "f16", "q4_0")]
    measured = evaluate(
        CallableModel(byte_model, "bytes"),
        heldout,
        candidates,
        context=128,
        windows=2,
        recall=1,
        recall_length=400,
        heads=False,
    )
    return {"settings": {"model": "bytes", "context": 128, "windows": 2}, **measured}


def test_what_is_measured(result: dict[str, Any]) -> None:
    assert result["layers"] == [{"layer": i, "kv_heads": 2, "head_dim": 128} for i in range(4)]
    assert 0.5 < result["exact"]["bits_per_byte"] < 4
    blocks, half, other = result["rows"]
    assert [row["cache"] for row in result["rows"]] == ["tq4:block_size=32", "f16", "q4_0"]
    assert [row["peer"] for row in result["rows"]] == [False, False, True]
    assert half["bytes_per_head"] == 512
    assert half["bytes_per_token"] == 4 * 2 * 512
    assert half["bits_per_number"] == 16
    assert half["loop"] == half["coded"]
    assert half["loop"]["kld"] < 1e-6
    assert half["loop"]["bits_per_byte"] == pytest.approx(result["exact"]["bits_per_byte"], abs=1e-3)
    assert half["recall"] == result["exact"]["recall"]
    assert other["loop"] == other["coded"]
    assert 0 < blocks["loop"]["kld"] < blocks["coded"]["kld"] < blocks["coded"]["kld_p999"]
    assert all(0.5 < row[view]["top1"] <= 1 for row in result["rows"] for view in ("coded", "loop"))


def test_table(result: dict[str, Any]) -> None:
    lines = report.table(result).splitlines()
    assert lines[0] == "bytes, 2 x 128 tokens of text; 4 layers, 2 KV heads of 128"
    assert [line.split()[0] for line in lines[6:]] == ["exact", "f16", "tq4:block_size=32", "q4_0"]
    assert len({len(line) for line in lines[3:]}) == 1


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        report.plot(result, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(begin)


def test_front_and_labels() -> None:
    assert report.front([(3, 1.0), (1, 9.0), (2, 9.5), (2, 4.0), (4, 1.5)]) == [(1, 9.0), (2, 4.0), (3, 1.0)]
    # The second would lie on the first and moves up, onto the third, which moves too; the fourth is elsewhere.
    heights = report.label_heights([(0, 0), (5, 3), (0, 11), (99, 1)], [20, 20, 20, 20], 10)
    assert heights == [0, 10, 20, 1]


# The command


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    words = ["--formats", "tq4", "q4_0", "--context", "256", "--windows", "1", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["torch_tqattn", "eval", *words])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "examples/model, 1 x 256 tokens of text; 4 layers, 2 KV heads of 128"
    assert [line.split()[0] for line in lines[6:]] == ["exact", "q4_0", "tq4"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_command_as_a_user_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "result.json"
    words = ["--formats", "f16", "tq4", "q4_0", "q4_0", "--context", "256", "--windows", "1", "--heads", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch_tqattn", "eval", *words, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Synthetic heads, all codes: relative error of the output" in done.stdout
    written = json.loads(file.read_text())
    assert set(written) == {"settings", "environment", "layers", "exact", "rows"}
    assert written["settings"]["context"] == 256
    assert written["environment"]["torch"] == torch.__version__
    assert [row["cache"] for row in written["rows"]] == ["f16", "tq4", "q4_0"]
    for row in written["rows"]:
        assert set(row["loop"]) == {"kld", "kld_p999", "top1", "bits_per_byte"}
        assert len(row["heads"]) == 11
        assert row["cache"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "tq7"], "unknown format 'tq7'"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--windows", "0"], "at least 1 window"),
        (["--context", "9999999"], "too few for 3 windows of 9999999"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["torch_tqattn", "eval", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err


def test_the_model_has_to_be_named_where_the_projects_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch_tqattn.fidelity.command.MODEL_PLACES", ())
    for arguments, message in (([], "give --model"), (["--model", "somebody/model"], "give --text")):
        monkeypatch.setattr(sys, "argv", ["torch_tqattn", "eval", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err


def test_missing_packages_are_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"absent_package is missing: pip install 'torch_tqattn\[eval\]'"):
        require("absent_package.part")
    assert require("math") is math
