"""The transformers integration: TurboQuantCache and the attention "tqattn" in tiny random models of many families.

`Checked` compares each call of the attention, in whatever mode `generate` makes it, with the model's own eager
attention over what the cache is as a dense tensor. Whole generations are compared by their tokens. Their logits may
differ by more than calls do: a difference of 1e-7 may be enough to round a number to another code.
"""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    FAMILIES,
    VOCABULARY,
    WINDOW,
    Checked,
    config_of,
    generate,
    make_model,
    make_vision_model,
    one_prompt,
    prompts,
)
from oracle import exact_attention, relative_error
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel

import torch_tqattn as tq
from torch_tqattn.integrations import transformers as integration
from torch_tqattn.integrations.transformers import TurboQuantCache
from torch_tqattn.integrations.transformers.attention import tqattn_attention
from torch_tqattn.integrations.transformers.cache import TurboQuantLayer

# float32 attention, in another order of additions; gemma4 scales no logits, so that they are large.
CALL_BOUND = 2e-5
SMALL_BLOCKS: dict[str, Any] = {"nbits": 4, "block_size": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": SMALL_BLOCKS,
    "residual": {**SMALL_BLOCKS, "residual_length": 10},
    "tokens": {"nbits_key": 6, "nbits_value": 3, "block_size": 0},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 7},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {},
}
FEW_FAMILIES = ("llama", "gemma4", "gpt_oss")  # full; sliding, shared and cut; sinks
MODELS: dict[tuple[str, ...], PreTrainedModel] = {}


@pytest.fixture(autouse=True)
def _expect_no_warning() -> Iterator[None]:
    Checked.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a TurboQuantCache is being read as dense")
        yield


def model_of(family: str, attention: str = "checked", device: str = "cpu") -> PreTrainedModel:
    key = (family, attention, device)
    if key not in MODELS:
        MODELS[key] = make_model(*key)
    return MODELS[key]


def cache_of(model: PreTrainedModel, **options: Any) -> TurboQuantCache:
    return TurboQuantCache(model.config, **options)


def draft_of(family: str, device: str = "cpu") -> PreTrainedModel:
    """Another model that is often right, but not always."""
    draft = make_model(family, "eager", device, noise=0.04)
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def arguments_of(mode: str, family: str, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and arguments of `generate`: two padded prompts where the mode takes a batch."""
    arguments = dict(MODES[mode])
    if mode == "assisted":
        arguments["assistant_model"] = draft_of(family, device)
    if mode in ("lookup", "assisted"):
        return {name: x.repeat(1, 2) for name, x in one_prompt(24, device).items()}, arguments
    return prompts(device=device), arguments


# Every family


@pytest.mark.parametrize("options", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_call_is_eager_attention_over_the_dense_cache(family: str, options: dict[str, Any], device: str) -> None:
    model = model_of(family, device=device)
    tokens, _ = generate(model, prompts(device=device), cache_of(model, **options))
    assert Checked.worst <= CALL_BOUND
    reference = model_of(family, "eager_over_dense", device)
    expected, _ = generate(reference, prompts(device=device), cache_of(reference, **options))
    assert torch.equal(tokens, expected)
    compressed = family != "deepseek_v3"  # its latent vectors are not keys and values; left as they are
    assert Checked.calls.get("Stored with a past", 0) == (15 * model.config.num_hidden_layers if compressed else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_attention_over_the_same_cache(family: str, device: str) -> None:
    model, reference = model_of(family, "tqattn", device), model_of(family, "eager_over_dense", device)
    inputs = prompts(device=device)
    cache, tokens, mask = cache_of(model, **SMALL_BLOCKS), inputs["input_ids"], inputs["attention_mask"]
    for _ in range(16):
        same = copy.deepcopy(cache)
        logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits[:, -1:]
        expected = reference(input_ids=tokens, attention_mask=mask, past_key_values=same).logits[:, -1:]
        assert (logits - expected).abs().max() <= 4e-4
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        tokens = logits.argmax(-1)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_chooses_the_tokens_of_the_stock_cache(family: str) -> None:
    model, stock = model_of(family), model_of(family, "eager")
    tokens, _ = generate(model, prompts(), cache_of(model, k_format="f16", v_format="f16"))
    assert torch.equal(tokens, generate(stock, prompts(), DynamicCache(config=stock.config))[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama4"])
def test_padding_changes_nothing(family: str) -> None:
    """It is not in the means of blocks, and the tokens that stay dense come after it."""
    model = model_of(family)
    inputs = prompts(padding=16)  # a whole block, so that others begin where they would
    alone = {name: x[:1, 16:] for name, x in inputs.items()}
    for arguments in ({}, {"prefill_chunk_size": 8}):  # the first chunks are nothing but padding
        tokens, logits = generate(model, inputs, cache_of(model, **SMALL_BLOCKS), **arguments)
        expected_tokens, expected = generate(model, alone, cache_of(model, **SMALL_BLOCKS), **arguments)
        assert torch.equal(tokens[:1], expected_tokens)
        assert (logits[:1] - expected).abs().median() <= 5e-3  # what padding in a mean would change is 0.1


@pytest.mark.parametrize("attention", ["checked", {"text_config": "checked", "vision_config": "sdpa"}], ids=str)
def test_text_part_of_a_vision_model(attention: Any, device: str) -> None:
    ids = [[0, 0, 5, 91, 90, 90, 90, 90, 92, 7, 8, 9], [3, 4, 5, 91, 90, 90, 90, 90, 92, 7, 8, 9]]
    x = torch.tensor(ids, device=device)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(device)
    inputs = {"input_ids": x, "attention_mask": (x != 0).long(), "token_type_ids": (x == 90).long()}
    inputs["pixel_values"] = pixels
    model, stock = make_vision_model(attention, device), make_vision_model("eager", device)
    tokens, _ = generate(model, inputs, cache_of(model, nbits=16))
    assert Checked.worst <= CALL_BOUND
    assert torch.equal(tokens, generate(stock, inputs, DynamicCache(config=stock.config))[0])
    with pytest.raises(
        NotImplementedError, match='tokens see newer ones, as those of an image may; use prefill="exact'
    ):
        generate(model, inputs, cache_of(model, prefill="stepwise", block_size=4))


# Everything that generate does


def check_mode(family: str, mode: str, options: dict[str, Any], device: str = "cpu") -> None:
    inputs, arguments = arguments_of(mode, family, device)
    model, reference = model_of(family, device=device), model_of(family, "eager_over_dense", device)
    tokens, _ = generate(model, inputs, cache_of(model, **options), **arguments)
    assert Checked.worst <= CALL_BOUND
    expected, _ = generate(reference, inputs, cache_of(model, **options), **arguments)
    assert torch.equal(tokens, expected)
    if family != "deepseek_v3":
        assert Checked.calls.get("Exact with a past", 0) > 0 or mode in ("greedy", "sampling", "beams")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_modes(family: str, mode: str) -> None:
    check_mode(family, mode, SMALL_BLOCKS)


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_modes_on_each_device(mode: str, device: str) -> None:
    check_mode("gemma3", mode, OPTIONS["residual"], device)


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param(o, id=n) for n, o in OPTIONS.items() if n != "blocks"])
@pytest.mark.parametrize("mode", list(MODES)[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_modes_of_all_families(family: str, mode: str, options: dict[str, Any]) -> None:
    check_mode(family, mode, options)


@pytest.mark.parametrize("mode", ["beams", "chunked", "lookup", "assisted"])
def test_modes_in_half_precision_choose_the_tokens_of_the_stock_cache(mode: str) -> None:
    model, stock = model_of("gemma3"), model_of("gemma3", "eager")
    inputs, arguments = arguments_of(mode, "gemma3")
    tokens, _ = generate(model, inputs, cache_of(model, nbits=16), **arguments)
    assert torch.equal(tokens, generate(stock, inputs, DynamicCache(config=stock.config), **arguments)[0])


def test_stock_attention_reads_the_cache_too() -> None:
    for attention in ("eager", "sdpa"):
        model, reference = model_of("mistral", attention), model_of("mistral")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens, _ = generate(model, one_prompt(), cache_of(model))
        assert any('attn_implementation="tqattn"' in str(w.message) for w in caught)
        assert torch.equal(tokens, generate(reference, one_prompt(), cache_of(model))[0])


def continue_with(model: PreTrainedModel, cache: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    """A second turn: six tokens more, then an answer to them."""
    more = torch.randint(2, VOCABULARY, (seen.shape[0], 6), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([seen, more.to(seen.device)], dim=1)
    mask = (ids != 0).long()
    return generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 6)


@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_second_turn_and_copies(family: str, device: str) -> None:
    model, reference = model_of(family, device=device), model_of(family, "eager_over_dense", device)
    inputs = prompts(device=device)
    results = []
    for m in (model, reference):
        cache = cache_of(m, **SMALL_BLOCKS)
        seen = torch.cat([inputs["input_ids"], generate(m, inputs, cache, 5)[0]], dim=1)
        other = copy.deepcopy(cache)
        answers = [continue_with(m, c, seen)[0] for c in (cache, other)]
        assert torch.equal(*answers)
        results.append(answers[0])
    assert torch.equal(*results)
    assert Checked.worst <= CALL_BOUND


@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_batch_operations(family: str, device: str) -> None:
    """Selected, repeated and reordered sequences go on as they would have alone."""
    model = model_of(family, "tqattn", device)
    inputs = prompts(device=device)
    cache = cache_of(model, **SMALL_BLOCKS)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)

    def next_logits(cache: TurboQuantCache, rows: list[int]) -> Tensor:
        token = torch.full((len(rows), 1), 7, device=device)
        mask = torch.cat([inputs["attention_mask"][rows], torch.ones_like(token)], dim=1)
        return model(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits

    both = next_logits(cache, [0, 1])
    calls: dict[str, tuple[Callable[[TurboQuantCache], None], list[int]]] = {
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 0], device=device)), [1, 0]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([1], device=device)), [1]),
        "select by bool": (lambda c: c.batch_select_indices(torch.tensor([True, False], device=device)), [0]),
        "select from the end": (lambda c: c.batch_select_indices(torch.tensor([-1, 0], device=device)), [1, 0]),
        "select by a tuple": (lambda c: c.batch_select_indices((1, 0)), [1, 0]),
        "select by a slice": (lambda c: c.batch_select_indices(slice(1, None)), [1]),
    }
    for name, (call, rows) in calls.items():
        changed = copy.deepcopy(cache)
        call(changed)
        assert relative_error(next_logits(changed, rows), both[rows]) <= 1e-5, name


@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_reset_forgets(family: str) -> None:
    model = model_of(family)
    cache = cache_of(model)
    first = generate(model, prompts(), cache)[0]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompts(), cache)[0], first)


def test_offload_between_update_and_attention(device: str) -> None:
    """As stock offloading does: a layer leaves the device before its attention runs, and comes back for its next."""

    class Offloading(TurboQuantCache):
        def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            layer = self.layers[layer_idx]
            layer.prefetch()
            handles = super().update(k, v, layer_idx, *args, **kwargs)
            layer.offload()
            return handles

    model = model_of("gemma3", device=device)
    inputs = prompts(device=device)
    tokens, _ = generate(model, inputs, Offloading(model.config, **SMALL_BLOCKS))
    assert torch.equal(tokens, generate(model, inputs, cache_of(model, **SMALL_BLOCKS))[0])


# Stepwise: as if tokens came one by one


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4", "llama4"])
@pytest.mark.parametrize("options", [pytest.param(o, id=n) for n, o in OPTIONS.items()])
def test_stepwise_does_not_depend_on_how_a_text_is_cut(family: str, options: dict[str, Any]) -> None:
    model = model_of(family, "tqattn")
    inputs = one_prompt(60)
    greedy, _ = generate(model, inputs, cache_of(model, prefill="stepwise", **options), 30)
    for cut in (
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 33},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": draft_of(family)},
    ):
        tokens, _ = generate(model, inputs, cache_of(model, prefill="stepwise", **options), 30, **cut)
        assert torch.equal(tokens, greedy), cut


def test_exact_prefill_depends_on_it() -> None:
    model = model_of("mistral", "tqattn")
    inputs = one_prompt(60)
    greedy, _ = generate(model, inputs, cache_of(model, **SMALL_BLOCKS), 30)
    chunked, _ = generate(model, inputs, cache_of(model, **SMALL_BLOCKS), 30, prefill_chunk_size=7)
    assert not torch.equal(chunked, greedy)


# Compiled


@pytest.mark.parametrize(
    ("family", "backend", "options"),
    [
        ("gemma3", "eager", SMALL_BLOCKS),
        pytest.param("gpt_oss", "eager", {**SMALL_BLOCKS, "skip_layers": [-1]}, marks=pytest.mark.slow),
        pytest.param("llama", "eager", {**SMALL_BLOCKS, "skip_layers": [0]}, marks=pytest.mark.slow),
        pytest.param("llama", "inductor", SMALL_BLOCKS, marks=pytest.mark.slow),
    ],
)
def test_compiled_generation(family: str, backend: str, options: dict[str, Any]) -> None:
    """One graph without breaks, for any length, with and without a block to code."""
    model = model_of(family, "tqattn")
    expected, _ = generate(model, prompts(), cache_of(model, **options), 40)
    settings = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=None)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for padding in (9, 7, 5):
        cache = cache_of(model, max_cache_len=80, **options)
        assert cache.is_compileable
        tokens, _ = generate(model, prompts(padding=padding), cache, 40, compile_config=settings)
        assert padding != 9 or torch.equal(tokens, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Each number is constant to the compiler until it has changed once.
    assert 0 < graphs[0] <= 5
    assert graphs[1] == graphs[2]


def test_room_made_once() -> None:
    model = model_of("gemma3", "tqattn")
    cache = cache_of(model, max_cache_len=50, skip_layers=[0])
    assert cache.is_compileable
    assert not cache_of(model).is_compileable
    assert cache.get_max_length() == 50
    generate(model, one_prompt(40), cache, 11)  # the last token is not fed
    rows = cache.report()
    assert [(row.kind, row.tokens) for row in rows[:2]] == [("DynamicSlidingWindowLayer", WINDOW - 1), ("full", 50)]
    assert cache.layers[1].cache.config.capacity == 50
    with pytest.raises(
        ValueError, match=r"1 more tokens do not fit: the cache holds 50 of max_cache_len 50; .* larger"
    ):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("attention", ["tqattn", "eager"])
@pytest.mark.parametrize("options", [{"skip_layers": [0]}, {"skip_layers": [-1]}, {"head_dim": 48}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_room_made_once_beside_dense_layers(family: str, options: dict[str, Any], attention: str) -> None:
    """One mask fits dense layers and compressed ones, before a window is full and after."""
    config = config_of(family)
    config.head_dim = options.get("head_dim", 64)
    stock, model = (make_model(family, name, config=config) for name in ("eager", attention))
    cache = TurboQuantCache(config, nbits=16, max_cache_len=40, skip_layers=options.get("skip_layers", ()))
    tokens, _ = generate(model, prompts(10, padding=3), cache, 30, disable_compile=True)
    assert torch.equal(tokens, generate(stock, prompts(10, padding=3), DynamicCache(config=config), 30)[0])


class OneLayer:
    """A layer and its attention, on random tokens, with the masks that transformers makes."""

    def __init__(self, window: int | None, prefill: str, device: str, **options: Any) -> None:
        formats = {"k_format": "tq4", "v_format": "tq4"}
        self.layer = TurboQuantLayer({**formats, **options}, window, prefill)
        self.window = window
        self.module = nn.Module()
        self.module.num_key_value_groups = 2
        generator = torch.Generator().manual_seed(2)
        self.q = torch.randn(1, 4, 400, 64, generator=generator).to(device)
        self.k, self.v = torch.randn(2, 1, 2, 400, 64, generator=generator).to(device)

    def take(self, begin: int, end: int, wrong: int = 0, padding: int = 0) -> Tensor:
        """Store tokens begin to end and attend; of these, the last `wrong` are others. [1, tokens, 4, 64].

        The first `padding` of all are hidden.
        """
        q, k, v = (x[:, :, begin:end].clone() for x in (self.q, self.k, self.v))
        for x in (q, k, v):
            x[:, :, end - begin - wrong :] = 3.0
        positions, start = self.layer.get_mask_sizes(end - begin)
        query = torch.arange(begin, end, device=q.device)[:, None]
        position = torch.arange(start, start + positions, device=q.device)
        mask = (position <= query) & (position >= padding)
        if self.window is not None:
            mask &= position > query - self.window
        handles = self.layer.update(k, v)
        assert handles[0].shape == (1, 2, positions, 64)
        return tqattn_attention(self.module, q, *handles, mask[None, None])[0]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("options", [{"block_size": 16}, {"block_size": 16, "residual_length": 9}, {"block_size": 0}])
def test_stepwise_rejected_tokens_leave_no_trace(window: int | None, options: dict[str, Any], device: str) -> None:
    """Bit for bit in what is stored; in the attention but for the order of additions."""
    straight = OneLayer(window, "stepwise", device, **options)
    guessing = OneLayer(window, "stepwise", device, **options)
    guessing.layer.activate_past_recording()
    straight.take(0, 50)
    guessing.take(0, 50 + 3, wrong=3)  # the prompt comes with the first guess
    guessing.layer.crop(-3)
    position, step = 50, 0
    while position < 300:
        right, wrong = step % 6 + 1, step % 5
        out = guessing.take(position, position + right + wrong, wrong)[:, :right]
        guessing.layer.crop(-wrong)
        expected = torch.cat([straight.take(i, i + 1) for i in range(position, position + right)], dim=1)
        assert relative_error(out, expected) <= 1e-5
        position, step = position + right, step + 1
        assert straight.layer.cache is not None
        assert guessing.layer.cache is not None
        for side in (0, 1):
            assert torch.equal(straight.layer.cache.dense()[side], guessing.layer.cache.dense()[side])


def test_rejected_tokens_of_a_padded_prompt_leave_no_trace(device: str) -> None:
    """Padding is known only after blocks were coded with it."""
    straight, guessing = (OneLayer(None, "stepwise", device, block_size=16) for _ in range(2))
    guessing.layer.activate_past_recording()
    for position in (45, 156):  # the second is more than is recorded
        straight.layer.reset()
        guessing.layer.reset()
        straight.take(0, position, padding=20)
        guessing.take(0, position + 7, wrong=7, padding=20)
        guessing.layer.crop(-7)
        out, expected = (one.take(position, position + 1, padding=20) for one in (guessing, straight))
        assert relative_error(out, expected) <= (1e-5 if position == 45 else 0.1)


@pytest.mark.parametrize("window", [None, 24])
def test_exact_prefill_sees_new_tokens_exactly_and_the_past_compressed(window: int | None, device: str) -> None:
    one = OneLayer(window, "exact", device, block_size=16)
    first = one.take(0, 100)
    expected, _ = exact_attention(one.q[:, :, :100], one.k[:, :, :100], one.v[:, :, :100], window=window)
    assert relative_error(first.transpose(1, 2), expected) <= 1e-6
    assert one.layer.cache is not None
    k, v = one.layer.cache._dense(one.layer.cache._begin(0))
    second = one.take(100, 170)
    k, v = (torch.cat(x, dim=2) for x in ((k, one.k[:, :, 100:170]), (v, one.v[:, :, 100:170])))
    expected, _ = exact_attention(one.q[:, :, 100:170], k, v, window=window)
    assert relative_error(second.transpose(1, 2), expected) <= 2e-6


# Taking back


@pytest.mark.parametrize("options", [SMALL_BLOCKS, {"nbits": 4, "block_size": 0}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_crop_without_recording(family: str, options: dict[str, Any]) -> None:
    model = model_of(family, "tqattn")
    inputs = one_prompt(40)
    long, short = cache_of(model, **options), cache_of(model, **options)
    model(input_ids=inputs["input_ids"], past_key_values=long)
    model(input_ids=inputs["input_ids"][:, :37], past_key_values=short)
    long.crop(-3)
    assert long.get_seq_length() == short.get_seq_length() == 37
    token = inputs["input_ids"][:, 37:38]
    logits, expected = (model(input_ids=token, past_key_values=c).logits for c in (long, short))
    assert relative_error(logits, expected) <= 1e-2  # blocks that were coded keep the errors of that


def test_crop_of_more_than_a_window_holds() -> None:
    one = OneLayer(24, "exact", "cpu", block_size=16)
    one.layer.crop(-3)  # nothing there
    one.take(0, 300)
    with pytest.raises(
        RuntimeError, match="cannot take back 200 tokens: a sliding layer with a window of 24 keeps 127"
    ):
        one.layer.crop(-200)
    with pytest.raises(ValueError, match="must be negative or 0, got 5"):
        one.layer.crop(5)
    one.layer.crop(0)
    assert one.layer.get_seq_length() == 300
    one.layer.crop(-100)
    assert one.layer.get_mask_sizes(2) == (25, 177)
    one.layer.crop(-200)
    assert one.layer.get_mask_sizes(2) == (2, 0)


# Memory


def test_room_grows_and_nothing_is_lost(device: str) -> None:
    for window in (None, 300):
        one = OneLayer(window, "exact", device, block_size=16)
        whole = tq.KVCache(1, 2, 64, 2000, "tq4", "tq4", device=device, window=window, block_size=16)
        for _ in range(4):
            for begin, end in ((0, 1), (1, 260), (260, 400)):
                one.layer.update(one.k[:, :, begin:end], one.v[:, :, begin:end])
                whole.append(one.k[:, :, begin:end], one.v[:, :, begin:end])
                cache = one.layer.cache
                assert cache is not None
                for got, expected in zip(cache.dense(), whole.dense(), strict=True):
                    assert torch.equal(got, expected)
        assert cache.config.capacity < 1.2 * 1600 + 256


def test_report() -> None:
    model = model_of("gemma3")
    cache = TurboQuantCache(model.config, skip_layers=[-1], **SMALL_BLOCKS)
    assert [row.ratio for row in cache.report()] == [1.0, 1.0, 1.0]
    generate(model, one_prompt(200), cache, 2)
    sliding, full, skipped = cache.report()
    assert (sliding.kind, sliding.format, sliding.tokens) == ("sliding", "tq4/tq4", WINDOW - 1)
    assert (full.kind, full.format, full.tokens) == ("full", "tq4/tq4", 201)
    assert (skipped.kind, skipped.format) == ("DynamicSlidingWindowLayer", "not compressed")
    assert full.dense_nbytes == 2 * 2 * 64 * 201 * 4
    assert full.nbytes == cache.layers[1].cache.nbytes
    assert 0.1 < full.ratio < 0.3
    assert skipped.ratio == 1.0
    assert cache.nbytes == sliding.nbytes + full.nbytes + skipped.nbytes
    assert "201 tokens" in str(full)
    latent = cache_of(model_of("deepseek_v3"))
    generate(model_of("deepseek_v3"), one_prompt(), latent, 2)
    assert {row.format for row in latent.report()} <= {"head dims 16/32", "head_dim 16"}


def test_unsupported_head_dims_stay_dense() -> None:
    cache = TurboQuantCache(config_of("mistral"))
    keys, values = cache.update(*torch.randn(2, 1, 2, 5, 48), 1)
    assert isinstance(keys, Tensor)
    assert isinstance(values, Tensor)
    row = cache.report()[1]
    assert (row.kind, row.format, row.tokens) == ("DynamicSlidingWindowLayer", "head_dim 48", 5)


@pytest.mark.parametrize("max_cache_len", [None, 60])
def test_early_initialization(max_cache_len: int | None) -> None:
    """Before the first tokens, which then are stored as they would be without it."""
    config = config_of("gemma3")
    early, late = (TurboQuantCache(config, max_cache_len=max_cache_len, **SMALL_BLOCKS) for _ in range(2))
    early.early_initialization(2, 2, [64, 48, 64], torch.float32, torch.device("cpu"))
    assert early.is_initialized
    for i, head_dim in enumerate((64, 48, 64)):
        k, v = torch.randn(2, 2, 2, 50, head_dim)
        for cache in (early, late):
            cache.update(k, v, i)
        assert torch.equal(early.layers[i].keys, late.layers[i].keys)
    assert early.report() == late.report()
    assert early.report()[1].format == "head_dim 48"


# Arguments


def test_formats_and_layers() -> None:
    config = config_of("gemma3")

    def formats(**options: Any) -> list[str]:
        return [row.format for row in TurboQuantCache(config, **options).report()]

    assert formats() == ["tq8/tq4"] * 3
    assert formats(nbits=4) == ["tq4/tq4"] * 3
    assert formats(nbits=4, nbits_key=16) == ["f16/tq4"] * 3
    assert formats(nbits_value=2, k_format="tq6-byte") == ["tq6-byte/tq2"] * 3
    assert formats(quantize_sliding=False) == ["not compressed", "tq8/tq4", "not compressed"]
    assert formats(skip_layers=(0, -1)) == ["not compressed", "tq8/tq4", "not compressed"]
    layers = {1: {"k_format": "tq3", "v_format": "tq5", "k_balance": torch.full((2, 64), 2.0)}}
    assert formats(plan=tq.Plan("", layers, {}, 0.0, 0.0)) == ["tq8/tq4", "tq3/tq5", "tq8/tq4"]


def test_plan_with_balanced_keys() -> None:
    model, stock = model_of("llama"), model_of("llama", "eager")
    balance = torch.rand(2, 64) + 0.5
    layers = {i: {"k_format": "f16", "v_format": "f16", "k_balance": balance} for i in range(3)}
    tokens, _ = generate(model, prompts(), cache_of(model, plan=tq.Plan("", layers, {}, 0.0, 0.0)))
    assert Checked.worst <= CALL_BOUND
    assert torch.equal(tokens, generate(stock, prompts(), DynamicCache(config=stock.config))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_format": "tq7"}, "unknown storage format 'tq7'"),
        ({"nbits": 7}, "nbits must be one of 2, 3, 4, 5, 6, 8, 16, got 7"),
        ({"skip_layers": [3]}, r"skip_layers must name layers -3 to 2, got \[3\]"),
        ({"prefill": "dense"}, "unknown prefill 'dense'; choose one of exact, stepwise"),
        ({"block_size": 0, "residual_length": 5}, "residual_length 5 needs blocks"),
        ({"encode": "good"}, "unknown encode 'good'"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(config_of("llama"), **options)


# The attention function


def attention_call(**options: Any) -> Tensor:
    """Two new tokens after five."""
    one = OneLayer(None, "exact", "cpu")
    one.layer.update(one.k[:, :, :5], one.v[:, :, :5])
    handles = one.layer.update(one.k[:, :, 5:7], one.v[:, :, 5:7])
    mask = options.pop("attention_mask", None)
    return tqattn_attention(one.module, one.q[:, :, 5:7], *handles, mask, **options)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_bias": torch.zeros(1, 4, 2, 7)}, "does not support position_bias, which Module passes; use eager"),
        ({"indices": torch.zeros(1)}, "does not support indices"),
        ({"block_table": torch.zeros(1)}, "does not support block_table"),
        ({"dropout": 0.1}, "dropout must be 0, got 0.1"),
        ({"attention_mask": torch.ones(1, 4, 2, 7, dtype=torch.bool)}, r"the same for all heads, got \[1, 4, 2, 7\]"),
        ({"attention_mask": torch.full((1, 1, 2, 7), 0.5)}, "adds other numbers to the logits; use eager"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        attention_call(**options)


def test_masks_of_numbers_are_masks() -> None:
    is_seen = torch.ones(1, 1, 2, 7, dtype=torch.bool).tril(5)
    is_seen[..., 2] = False
    expected = attention_call(attention_mask=is_seen)
    for hidden in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        mask = torch.zeros(1, 1, 2, 7).masked_fill(~is_seen, hidden)
        assert torch.equal(attention_call(attention_mask=mask), expected)


def test_no_mask_is_causal_with_the_last_query_at_the_last_position() -> None:
    causal = torch.ones(1, 1, 2, 7, dtype=torch.bool).tril(5)
    assert torch.equal(attention_call(), attention_call(attention_mask=causal))
    everything = torch.ones(1, 1, 2, 7, dtype=torch.bool)
    assert torch.equal(attention_call(is_causal=False), attention_call(attention_mask=everything))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"s_aux": torch.arange(4.0)}], ids=["", "softcap", "sinks"])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_attention_over_tensors(options: dict[str, Any], queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model without a cache passes, or a layer that was left dense; some queries at a time."""
    monkeypatch.setattr("torch_tqattn.integrations.transformers.queries.TILE", 2 * 4 * 20 * 3)
    module = nn.Module()
    module.num_key_value_groups = 2
    q, (k, v) = torch.randn(2, 4, queries, 48), torch.randn(2, 2, 2, 20, 48)
    out = tqattn_attention(module, q, k, v, None, scaling=0.3, **options)[0]
    renamed = {"softcap": options.get("softcap", 0.0), "sinks": options.get("s_aux")}
    expected, _ = exact_attention(q, k, v, scale=0.3, **renamed)
    assert relative_error(out.transpose(1, 2), expected) <= 1e-6


def test_training_without_a_cache_has_gradients() -> None:
    model = model_of("gemma2", "tqattn")
    inputs = prompts()
    with torch.enable_grad():
        loss = model(**inputs, use_cache=False, labels=inputs["input_ids"]).loss
        loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.isfinite().all()
    with (
        torch.enable_grad(),
        pytest.raises(NotImplementedError, match=r"has no gradients: call under torch.no_grad\(\)"),
    ):
        model(**inputs, past_key_values=cache_of(model))
    model.zero_grad()


def test_handles_look_like_tensors() -> None:
    one = OneLayer(None, "exact", "cpu", block_size=16)
    one.take(0, 20)
    keys, values = one.layer.update(one.k[:, :, 20:22], one.v[:, :, 20:22])
    assert keys.shape == keys.size() == (1, 2, 22, 64)
    assert (keys.size(-1), keys.ndim, keys.dim(), len(keys)) == (64, 4, 4, 1)
    assert (keys.dtype, keys.device) == (torch.float32, torch.device("cpu"))
    assert keys.to("cpu") is keys.to(torch.float32) is keys
    assert keys.to(torch.float16).dtype == torch.float16
    dense = values.dense()
    assert torch.equal(dense[:, :, 20:], one.v[:, :, 20:22])
    assert torch.equal(values[:, 0], dense[:, 0])
    assert torch.equal(torch.cat([values, dense], dim=1), torch.cat([dense, dense], dim=1))
    assert torch.equal(values.transpose(2, 3), dense.transpose(2, 3))
    assert torch.equal(2 * values - values / 2 + 1, 2 * dense - dense / 2 + 1)
    assert torch.equal(values @ dense.mT, dense @ values.mT)
    assert torch.equal(one.layer.values, one.layer.cache.dense()[1])


def test_nothing_in_the_core_imports_transformers() -> None:
    code = "import sys, torch_tqattn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_older_transformers_is_refused() -> None:
    program = "import transformers\ntransformers.__version__ = '5.19.1'\nimport torch_tqattn.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = 'needs transformers 5.20 or newer, found 5.19.1: pip install --upgrade "transformers>=5.20"'
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert expected in done.stderr


def test_the_version_that_is_required_is_the_one_that_pip_installs() -> None:
    root = Path(__file__).parent.parent
    assert f'transformers = ["transformers>={integration.REQUIRED}"]' in (root / "pyproject.toml").read_text()
    assert f"transformers {integration.REQUIRED} or newer" in (root / "docs" / "transformers.md").read_text()
