"""TQAttention: the module that owns its cache."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
from caches import same_state
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor, nn

import torch_tqattn as tq

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def tokens(device: str, count: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    sizes = [(batch, heads, count, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(size, device=device) for size in sizes)
    return q, k, v


def module(max_seq_len: int = 400, **options: Any) -> tq.TQAttention:
    return tq.TQAttention(HEADS, KV_HEADS, HEAD_DIM, max_seq_len, **options)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, cache: tq.KVCache, **options: Any) -> Tensor:
    """What KVCache and attention make of the tokens when they come one at a time."""
    outs = []
    for i in range(q.shape[2]):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        outs.append(tq.attention(q[:, :, i : i + 1], cache, **options))
    return torch.cat(outs, dim=2)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"block_size": 0},
    {"block_size": 16, "k_format": "tq6", "v_format": "f16"},
    {"block_size": 16, "residual_length": 40, "encode": "plain"},
    {"block_size": 16, "sink_length": 20, "encode": "best"},
    {"block_size": 0, "sink_length": 0},
    {"k_format": "f16", "v_format": "f16"},
    {"window": 40},
    {"window": 40, "block_size": 16, "residual_length": 5},
    {"window": 200, "block_size": 0},
    {"window": 1000},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prompt_then_tokens_is_cache_and_attention(device: str, options: dict[str, Any]) -> None:
    q, k, v = tokens(device, 330)
    attention = module(scale=0.2, softcap=6.0, **options)
    outs = [attention(*part) for part in zip(*(x.split([300, 1, 1, 28], dim=2) for x in (q, k, v)), strict=True)]
    cache = tq.KVCache(2, KV_HEADS, HEAD_DIM, 400, device=device, **options)
    expected = one_by_one(q, k, v, cache, scale=0.2, softcap=6.0)
    for out, part in zip(outs, expected.split([300, 1, 1, 28], dim=2), strict=True):
        assert relative_error(out, part) <= 2 * float32_bound(330)
    assert attention.cache is not None
    for kept, other in zip(attention.cache.dense(), cache.dense(), strict=True):
        assert torch.equal(kept, other)


@pytest.mark.parametrize("window", [None, 40])
def test_prompt_is_close_to_exact_attention(device: str, window: int | None) -> None:
    q, k, v = tokens(device, 300)
    out = module(window=window, k_format="f16", v_format="f16")(q, k, v)
    expected, _ = exact_attention(q, k, v, window=window)
    assert relative_error(out, expected) <= 2 * 2**-11  # keys and values were rounded to half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_type_of_the_query(device: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tokens(device, 140))
    assert module()(q, k, v).dtype == dtype


@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_masks_and_sinks_of_a_long_prompt(device: str, options: dict[str, Any]) -> None:
    q, k, v = tokens(device, 290)
    sinks = torch.randn(HEADS, device=device)
    for shape in ((2, 290, 310), (1, 1, 290, 310), (2, 1, 310)):
        mask = torch.rand(shape, device=device) < 0.7
        attention = module(**options)
        first = tokens(device, 20)
        attention(*first)
        out = attention(q, k, v, attn_mask=mask, sinks=sinks)
        cache = tq.KVCache(2, KV_HEADS, HEAD_DIM, 400, device=device, **options)
        cache.append(*first[1:])
        rows = (mask[:, 0] if mask.dim() == 4 else mask).expand(-1, 290, -1)
        expected = []
        for i in range(290):
            cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            seen = rows[:, i : i + 1, : len(cache)]
            expected.append(tq.attention(q[:, :, i : i + 1], cache, attn_mask=seen, sinks=sinks))
        assert relative_error(out, torch.cat(expected, dim=2)) <= 2 * float32_bound(310)


@pytest.mark.parametrize("options", [{}, {"window": 40}], ids=str)
def test_padded_prompt(device: str, options: dict[str, Any]) -> None:
    q, k, v = tokens(device, 300)
    attention = module(block_size=0, **options)
    out = attention(q, k, v, left_padding=[0, 150])
    alone = module(block_size=0, **options)(q[1:, :, 150:], k[1:, :, 150:], v[1:, :, 150:])
    assert relative_error(out[1:, :, 150:], alone) <= 2 * float32_bound(300)
    assert (out[1, :, :150] == 0).all()


def test_balanced_keys(device: str) -> None:
    balance = torch.rand(KV_HEADS, HEAD_DIM, device=device) + 0.5
    q, k, v = tokens(device, 200)
    attention = module(k_balance=balance)
    out = attention(q, k, v)
    cache = tq.KVCache(2, KV_HEADS, HEAD_DIM, 400, device=device, k_balance=balance)
    assert relative_error(out, one_by_one(q, k, v, cache)) <= 2 * float32_bound(200)
    attention.reset()
    assert torch.equal(attention(q, k, v), out)
    assert not list(attention.parameters())


def test_no_tokens(device: str) -> None:
    attention = module()
    for _ in range(2):
        assert attention(*tokens(device, 0)).shape == (2, HEADS, 0, HEAD_DIM)
        attention(*tokens(device, 3))


def bad_calls(device: str) -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], str]]:
    """For 300 tokens: enough to be cut, so that the last part must be refused with the first."""
    q, k, v = tokens(device, 300)
    return {
        "other heads": ((q[:, :3], k, v), {}, r"q must be \[batch, 4, tokens, 64\]"),
        "q of three dimensions": ((q[0], k, v), {}, r"q must be \[batch, 4, tokens, 64\]"),
        "k of three dimensions": ((q, k[0], v), {}, "got shape"),
        "k shorter": ((q, k[:, :, :200], v[:, :, :200]), {}, "as many"),
        "v shorter": ((q, k, v[:, :, :299]), {}, "as many"),
        "k longer than whole parts": ((q[:, :, :256], k, v), {}, "as many"),
        "other KV heads": ((q, k[:, :1], v[:, :1]), {}, "k has 1 heads, the cache has 2"),
        "another head_dim": (tuple(x[..., :32] for x in (q, k, v)), {}, "q has head_dim 32, the cache has 64"),
        "another batch": ((q, k[:1], v[:1]), {}, "k has a batch of 1, the cache has one of 2"),
        "int": ((q, k.int(), v), {}, "k must be float32"),
        "sinks of another size": ((q, k, v), {"sinks": q[0, 0, 0, :3]}, "sinks must be"),
        "mask of half the positions": (
            (q, k, v),
            {"attn_mask": torch.ones(1, 300, 150, dtype=torch.bool, device=device)},
            "mask",
        ),
        "mask of more rows": (
            (q, k, v),
            {"attn_mask": torch.ones(1, 330, 300, dtype=torch.bool, device=device)},
            "mask",
        ),
        "mask of fewer rows": (
            (q, k, v),
            {"attn_mask": torch.ones(1, 260, 300, dtype=torch.bool, device=device)},
            "mask",
        ),
        "padding of another batch": ((q, k, v), {"left_padding": [1, 2, 3]}, "left_padding"),
    }


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"block_size": 0}], ids=str)
@pytest.mark.parametrize("case", bad_calls("cpu"))
def test_a_call_that_fails_leaves_everything_as_it_was(device: str, case: str, options: dict[str, Any]) -> None:
    arguments, keywords, message = bad_calls(device)[case]
    attention = module(**options)
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **keywords)
    assert attention.cache is None
    attention(*tokens(device, 5))
    before = state(attention)
    if "attn_mask" in keywords:
        mask = keywords["attn_mask"]
        keywords = {"attn_mask": torch.nn.functional.pad(mask, (5, 0), value=True)}
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **keywords)
    assert same_state(state(attention), before)


def test_a_prompt_beyond_the_capacity_is_refused_whole(device: str) -> None:
    attention = module(max_seq_len=310)
    attention(*tokens(device, 20))
    before = state(attention)
    with pytest.raises(ValueError, match="291 more tokens do not fit"):
        attention(*tokens(device, 291))
    assert same_state(state(attention), before)
    attention(*tokens(device, 290))


def test_masks_of_a_long_windowed_prompt_are_refused(device: str) -> None:
    attention = module(window=20)
    mask = torch.ones(1, 300, 300, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="with a window, attn_mask"):
        attention(*tokens(device, 300), attn_mask=mask)
    assert attention.cache is None


def state(attention: nn.Module) -> dict[str, Any]:
    """What the module's cache holds."""
    assert isinstance(attention, tq.TQAttention)
    assert attention.cache is not None
    return attention.cache.state_dict()


class Layers(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(module(**options) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](q, k, v), k, v)


def test_a_cache_is_no_part_of_a_checkpoint(device: str, tmp_path: Path) -> None:
    """Those of models made without this module load, before a call and after, and other tools can write them."""
    model = nn.Sequential(nn.Linear(3, 3), Layers()).to(device)
    for _ in range(2):
        assert model.state_dict().keys() == {"0.weight", "0.bias"}
        model.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=True)
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
        safetensors.torch.load_model(model, str(tmp_path / "model.safetensors"))
        model[1](*tokens(device, 140))
    assert model[1].layers[0].cache is not None


def test_a_saved_cache_goes_on_in_another_module(device: str, tmp_path: Path) -> None:
    attention, other = module(), module()
    attention(*tokens(device, 140))
    assert attention.cache is not None
    attention.cache.save(tmp_path / "cache")
    other.cache = tq.KVCache.load(tmp_path / "cache", device)
    more = tokens(device, 3)
    assert torch.equal(other(*more), attention(*more))


@pytest.mark.parametrize("balanced", [False, True])
def test_moving_a_model_moves_its_caches(device: str, balanced: bool) -> None:
    balance = torch.rand(KV_HEADS, HEAD_DIM) + 0.5 if balanced else None
    model = Layers(k_balance=balance).to(device)
    q, k, v = tokens(device, 140)
    model(q, k, v)
    states = [state(layer) for layer in model.layers]
    for moved in (model.to("cpu"), model.cpu(), model.to(device), model.to(device, torch.float16)):
        for layer, before in zip(moved.layers, states, strict=True):
            now = state(layer)
            assert now["tensors"].keys() == before["tensors"].keys()
            for name, tensor in now["tensors"].items():
                assert torch.equal(tensor.cpu(), before["tensors"][name].cpu()), name
                assert tensor.dtype == before["tensors"][name].dtype
    assert model.layers[0].cache is not None
    assert model.layers[0].cache.device.type == device
    model(*tokens(device, 1))
    assert model.to("meta").layers[1].cache.device.type == "meta"


def test_types_of_a_model_are_not_those_of_its_caches(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), module(k_format="f16")).to(device)
    model[1](*tokens(device, 140))
    before = state(model[1])
    for change in (model.half, model.bfloat16, model.float, lambda: model.type(torch.float16)):
        change()
        assert same_state(state(model[1]), before)


@pytest.mark.parametrize("options", [{}, {"block_size": 16}, {"window": 30}], ids=str)
def test_a_compiled_module_is_one_graph_that_lengths_do_not_recompile(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, other = Layers(**options), Layers(**options)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(70):
        new = tokens("cpu", 1)
        assert torch.equal(compiled(*new), other(*new))
    # As for KVCache, and once more without a cache.
    assert counter.frame_count <= 6


def test_deepcopy_is_independent(device: str) -> None:
    model = Layers()
    model(*tokens(device, 140))
    states = [state(layer) for layer in model.layers]
    other = copy.deepcopy(model)
    more = tokens(device, 3)
    out = other(*more)
    assert all(same_state(state(layer), before) for layer, before in zip(model.layers, states, strict=True))
    assert torch.equal(model(*more), out)


def test_reset_takes_another_batch_size(device: str) -> None:
    attention = module()
    attention(*tokens(device, 3))
    with pytest.raises(ValueError, match="q has a batch of 5, the cache has one of 2"):
        attention(*tokens(device, 3, batch=5))
    attention.reset()
    assert attention.cache is None
    attention(*tokens(device, 3, batch=5))
    assert attention.cache is not None
    assert attention.cache.config.batch_size == 5


def test_repr_says_what_it_is(device: str) -> None:
    attention = module(k_format="tq6")
    assert "4 heads on 2 of 64, tq6/tq4" in repr(attention)
    attention(*tokens(device, 3))
    assert "3 of 400 tokens" in repr(attention)


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 0}, "num_heads 0 must be a positive multiple of num_kv_heads 2"),
    ({"num_heads": 3}, "num_heads 3 must be a positive multiple of num_kv_heads 2"),
    ({"num_heads": -2}, "num_heads -2 must be"),
    ({"num_heads": "4"}, "num_heads '4' must be"),
    ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
    ({"head_dim": 72}, "unsupported head_dim 72; choose one of 64, 80"),
    ({"max_seq_len": 0}, "must be a positive integer, got 0"),
    ({"k_format": "int4"}, "unknown storage format 'int4'; choose one of f16"),
    ({"v_format": "int4"}, "unknown storage format 'int4'; choose one of f16"),
    ({"window": 0}, "window must be None"),
    ({"block_size": -1}, "block_size must be a non-negative integer"),
    ({"residual_length": 1.5}, "residual_length must be a non-negative integer"),
    ({"encode": "slow"}, "unknown encode 'slow'; choose one of fast, best, plain"),
    ({"sink_length": -1}, "sink_length must be a non-negative integer, got -1"),
    ({"k_balance": torch.ones(KV_HEADS, 80)}, r"k_balance must be float32 \[num_kv_heads, head_dim\] = \[2, 64\]"),
    ({"scale": math.nan}, "scale must be None .* or finite, got nan"),
    ({"softcap": -1.0}, "softcap must be 0 .* or a positive number, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_arguments_are_reported_at_once(changes: dict[str, Any], message: str) -> None:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_seq_len": 8}
    with pytest.raises(ValueError, match=message):
        tq.TQAttention(**{**sizes, **changes})


PREFILL = """
import resource, sys, torch, torch_tqattn as tq
torch.set_grad_enabled(False)
attention = tq.TQAttention(8, 8, 128, 8192, "tq4", "tq4")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def prefill(tokens):
    x = torch.randn(3, 1, 8, tokens, 128)
    attention(x[0], x[1], x[2])
prefill(256)
before = peak()
for _ in range(31):
    prefill(256)
print(peak() - before)
"""


@pytest.mark.slow
def test_prefill_never_holds_the_past_dense() -> None:
    done = subprocess.run([sys.executable, "-c", PREFILL], capture_output=True, text=True, check=True)
    codes = 8192 * 8 * 2 * 70  # of which the buffers are allocated before, but touched only as they fill
    dense_past = 8192 * 8 * 2 * 128 * 4
    assert int(done.stdout) < codes + dense_past / 4
