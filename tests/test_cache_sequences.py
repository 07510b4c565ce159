"""Any sequence of calls, and compiled ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from caches import FORMATS, HALF_STEP, LLOYD_MAX, a_balance, is_half_rounded, random_kv, same_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([0, 16, 128]))
    return {
        "batch_size": draw(st.integers(1, 3)),
        "num_kv_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from(tq.HEAD_DIMS)),
        "capacity": draw(st.sampled_from([1, 40, 250, 600])),
        "k_format": draw(st.sampled_from(FORMATS)),
        "v_format": draw(st.sampled_from(FORMATS)),
        "window": draw(st.sampled_from([None, None, 1, 30, 250])),
        "block_size": block_size,
        "residual_length": draw(st.sampled_from([0, 1, 20, 150])) if block_size else 0,
        "sink_length": draw(st.sampled_from([0, 1, 4, 20, 150])),
        "encode": draw(st.sampled_from(fmt.ENCODES)),
    }


class Model:
    """What a cache of `config` must hold: the tokens themselves, of which the newest `exact` were never cropped to."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.config, self.device = config, device
        self.cache = tq.KVCache(**config, device=device)
        self.forget()

    def forget(self) -> None:
        shape = (self.config["batch_size"], self.config["num_kv_heads"], 0, self.config["head_dim"])
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)  # what may still be seen, oldest first
        self.exact = 0
        self.appended = 0  # positions that the cache counts

    @property
    def limit(self) -> int:
        return min(self.config["capacity"], self.config["window"] or self.config["capacity"])

    @property
    def is_ring(self) -> bool:
        return (self.config["window"] or math.inf) <= self.config["capacity"]

    def append(self, tokens: int) -> None:
        k, v = random_kv(self.device, *self.k.shape[:2], tokens, self.k.shape[3])
        held = len(self.cache)
        if not self.is_ring and held + tokens > self.config["capacity"]:
            with pytest.raises(ValueError, match="do not fit"):
                self.cache.append(k, v)
            return
        self.cache.append(k, v)
        self.k, self.v = (torch.cat([old, new.cpu()], dim=2) for old, new in ((self.k, k), (self.v, v)))
        self.exact += tokens
        self.appended += tokens

    def crop(self, length: int) -> None:
        before = self.cache.dense()
        held = len(self.cache)
        self.cache.crop(length)
        kept = length if length >= 0 else held + length
        self.appended = self.appended - held + kept if length else 0
        if length >= 0:
            assert len(self.cache) == length
            self.k, self.v = (x[:, :, x.shape[2] - held :][:, :, :kept] for x in (self.k, self.v))
        else:
            assert kept <= len(self.cache) <= max(self.limit, kept)
            self.k, self.v = (x[:, :, : x.shape[2] + length] for x in (self.k, self.v))
        self.exact = 0
        for now, then in zip(self.cache.dense(), before, strict=True):
            assert is_half_rounded(now[:, :, len(self.cache) - kept :], then[:, :, :kept])

    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.k, self.v = self.k[index], self.v[index]

    def save_and_load(self, path: Path) -> None:
        self.cache.save(path)
        loaded = tq.KVCache.load(path, self.device)
        assert same_state(loaded.state_dict(), self.cache.state_dict())
        self.cache = loaded

    def reset(self) -> None:
        self.cache.reset()
        self.forget()

    def check(self, queries: int) -> None:
        held = len(self.cache)
        k, v = self.cache.dense()
        assert k.shape == v.shape == (*self.k.shape[:2], held, self.k.shape[3])
        assert held <= min(self.limit, self.k.shape[2])
        if not self.is_ring or self.exact >= self.limit:
            assert held == min(self.limit, self.k.shape[2])
        for decoded, original, name in ((k, self.k, "k_format"), (v, self.v, "v_format")):
            coded = self.config[name] != "f16"
            if original.shape[2] == held == self.appended:  # the first tokens are still seen
                sinks = slice(0, self.config["sink_length"])
                assert is_half_rounded(decoded[:, :, sinks], original[:, :, sinks])
            dense = min(self.exact, held, self.config["residual_length"] if coded else held)
            assert is_half_rounded(decoded[:, :, held - dense :], original[:, :, original.shape[2] - dense :])
            bits = tq.FORMATS[self.config[name]].bits
            limit = 2 * math.sqrt(LLOYD_MAX[bits]) if coded else 2 * HALF_STEP
            assert relative_error(decoded, original[:, :, original.shape[2] - held :]) <= limit
        queries = min(queries, held) if self.config["window"] is None else 1
        q = torch.randn(k.shape[0], 2 * k.shape[1], queries, k.shape[3]).to(self.device)
        if held and queries:
            expected, _ = exact_attention(q, k, v)
            assert relative_error(tq.attention(q, self.cache), expected) <= float32_bound(held)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configurations(), data=st.data())
def test_any_sequence_of_calls(device: str, tmp_path: Path, config: dict[str, Any], data: st.DataObject) -> None:
    model = Model(config, device)
    calls = ["append"] * 4 + ["crop", "crop", "reorder", "save_and_load", "reset"]
    for call in data.draw(st.lists(st.sampled_from(calls), min_size=2, max_size=9)):
        held = len(model.cache)
        if call == "append":
            model.append(data.draw(st.integers(1, 200)))
        elif call == "crop":
            model.crop(data.draw(st.integers(-held, held)))
        elif call == "reorder":
            size = config["batch_size"]
            model.reorder(data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size)))
        elif call == "save_and_load":
            model.save_and_load(tmp_path / "cache")
        else:
            model.reset()
        model.check(data.draw(st.integers(1, 5)))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_compiled_loop_is_one_graph_that_lengths_do_not_recompile(balanced: bool) -> None:
    def loop(cache: tq.KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k, v)
        return tq.attention(q, cache) * 2

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loop, fullgraph=True, backend=counter)
    balance = a_balance(2, 64, "cpu") if balanced else None
    caches = [tq.KVCache(1, 2, 64, 64, "tq8", "tq4", block_size=16, k_balance=balance) for _ in range(2)]
    for _ in range(40):
        q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
        assert torch.equal(compiled(caches[0], q, k, v), loop(caches[1], q, k, v))
    # Lengths 0 and 1 are always special to the compiler; then any length without, and any with, a block that is coded.
    assert counter.frame_count <= 5


@pytest.mark.parametrize("window", [None, 64])
def test_a_cache_is_made_and_grown_within_a_graph(window: int | None) -> None:
    def first_step(q: Tensor, kv: Tensor) -> Tensor:
        cache = tq.KVCache(1, 2, 64, 16, block_size=16, window=window)
        cache.grow(128)
        return cache.step(q, kv, kv)[0]

    torch._dynamo.reset()
    q, kv = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64)
    assert torch.equal(torch.compile(first_step, fullgraph=True, backend="eager")(q, kv), first_step(q, kv))
