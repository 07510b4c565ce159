"""The batch of a KVCache, its copies and its state."""

import copy
import math
from typing import Any

import pytest
import torch
from caches import (
    PADDING,
    filled,
    random_kv,
    same_bytes,
    same_state,
)

import torch_tqattn as tq


@pytest.mark.parametrize("options", [{}, {"block_size": 16, "window": 20}, {"block_size": 0}], ids=str)
def test_reorder_and_select(device: str, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 3, 2, 60, 64)
    for method, index in (("reorder", [2, 0, 0]), ("select", [1]), ("select", [2, 1, 2, 0, 0])):
        for given_index in (index, torch.tensor(index, device=device)):
            cache = filled(k, v, left_padding=PADDING, **options)
            getattr(cache, method)(given_index)
            padding = [PADDING[i] for i in index]
            expected = filled(k[index], v[index], left_padding=padding, **options)
            state, expected_state = cache.state_dict(), expected.state_dict()
            if not any(padding):
                state["tensors"].pop("starts", None)
            assert same_state(state, expected_state)
            assert cache.config.batch_size == len(index)
            q = torch.randn(len(index), 2, 1, 64, device=device)
            assert same_bytes(tq.attention(q, cache), tq.attention(q, expected))


@pytest.mark.parametrize(
    "index", [[0, 1, 3], [-1, 0, 1], [], [[0, 1, 2]], [0.0, 1.0, 2.0], [True, False, True]], ids=str
)
@pytest.mark.parametrize("method", ["reorder", "select"])
def test_index_that_names_no_sequences(device: str, method: str, index: Any) -> None:
    cache = filled(*random_kv(device, 3, 1, 4, 64))
    before = cache.state_dict()
    with pytest.raises(ValueError, match="must name sequences 0 to 2"):
        getattr(cache, method)(index)
    assert same_state(cache.state_dict(), before)


def test_reorder_keeps_the_batch_size(device: str) -> None:
    cache = filled(*random_kv(device, 3, 1, 4, 64))
    with pytest.raises(ValueError, match="each of 3 sequences, got 2; use select"):
        cache.reorder([0, 1])


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"block_size": 0}], ids=str)
def test_reset_forgets_everything(device: str, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 2, 1, 200, 64)
    cache = filled(k * math.nan, v * math.nan, left_padding=[0, 3], **options)
    cache.reset()
    assert len(cache) == 0
    assert cache.dense()[0].shape == (2, 1, 0, 64)
    cache.append(k, v)
    assert same_state(cache.state_dict(), filled(k, v, **options).state_dict())


def test_deepcopy_is_independent(device: str) -> None:
    k, v = random_kv(device, 2, 1, 140, 64)
    cache = filled(k, v, left_padding=[0, 3], capacity=300)
    before = cache.state_dict()
    other = copy.deepcopy(cache)
    assert same_state(other.state_dict(), before)
    other.append(k, v)
    assert same_state(cache.state_dict(), before)
    cache.reset()
    assert len(other) == 280


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"block_size": 0}, {"v_format": "f16"}], ids=str)
@pytest.mark.parametrize("tokens", [0, 7, 128, 300])
def test_state_dict_is_everything(device: str, tokens: int, options: dict[str, Any]) -> None:
    k, v = random_kv(device, 2, 1, tokens, 64)
    options = {"capacity": 400, **options}
    cache = filled(k, v, left_padding=[0, 3], **options)
    state = cache.state_dict()
    other = filled(*random_kv(device, 2, 1, 222, 64), left_padding=[1, 0], **options)
    other.load_state_dict(state)
    assert same_state(other.state_dict(), state)
    more = random_kv(device, 2, 1, 60, 64)
    for either in (cache, other):
        either.append(*more)
    assert same_state(other.state_dict(), cache.state_dict())
    assert all(map(same_bytes, other.dense(), cache.dense()))
    assert not same_state(state, cache.state_dict())  # a copy, not a view


OTHER_CONFIGS = {
    "batch_size": 1,
    "num_kv_heads": 2,
    "head_dim": 80,
    "capacity": 41,
    "k_format": "tq6",
    "v_format": "tq5",
    "window": 8,
    "block_size": 16,
    "residual_length": 1,
    "encode": "plain",
    "sink_length": 0,
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_state_of_another_configuration_is_refused(device: str, name: str) -> None:
    cache = filled(*random_kv(device, 2, 1, 30, 64), capacity=40)
    before = cache.state_dict()
    arguments = {**before["config"], "device": device, name: OTHER_CONFIGS[name]}
    with pytest.raises(ValueError, match=f"{name}.*{OTHER_CONFIGS[name]}"):
        cache.load_state_dict(tq.KVCache(**arguments).state_dict())
    assert same_state(cache.state_dict(), before)


def test_state_of_another_version_or_shape_is_refused(device: str) -> None:
    cache = filled(*random_kv(device, 2, 1, 130, 64))
    before = cache.state_dict()
    tensors = before["tensors"]
    for state, message in (
        ({}, "no version, config, counters, tensors: pass what KVCache.state_dict returned"),
        ({**before, "config": {}}, "the state is of a cache with {}"),
        ({**before, "config": {**before["config"], "colour": "red"}}, "red"),
        (
            {**before, "counters": {"length": 130}},
            r"counters \['length'\], expected \['coded', 'first', 'length', 'stored'\]",
        ),
        ({**before, "version": 99}, "version 99, supported is 1"),
        ({**before, "tensors": {**tensors, "k_tail": tensors["k_tail"][:, :, :1]}}, "k_tail is"),
        ({**before, "tensors": {**tensors, "k_norms": tensors["k_norms"].half()}}, "k_norms is torch.float16"),
        ({**before, "tensors": {**tensors, "extra": tensors["k_tail"]}}, "extra"),
        ({**before, "tensors": {"k_codes": tensors["k_codes"]}}, "expected"),
        ({**before, "tensors": {**tensors, "starts": torch.zeros(3, dtype=torch.int32)}}, "starts is"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(state)
        assert same_state(cache.state_dict(), before)


def test_repr_says_what_it_is(device: str) -> None:
    cache = filled(*random_kv(device, 2, 3, 5, 64), capacity=99, k_format="tq6", v_format="tq5-byte")
    for part in ("tq6/tq5-byte", "5 of 99 tokens", "batch 2", "3 heads of 64", f"{cache.nbytes} bytes", device):
        assert part in repr(cache)
