"""Every kernel on a GPU's tensors against the CPU's operators, in samples that together have every head dim, every
format of K and of V and every feature. Few enough to run under checks of races and memory errors: those of the double
of Metal, or compute-sanitizer's.
"""

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch
from oracle import float32_bound, relative_error
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt

tqattn = torch.ops.tqattn
TYPES = [torch.float32, torch.float16, torch.bfloat16]
KV_HEADS = 2
BATCH = 2


@dataclass(frozen=True)
class Sample:
    """A cache, what is appended to it, and how it is attended to."""

    head_dim: int
    k_format: str
    v_format: str
    k_type: torch.dtype
    v_type: torch.dtype
    settings: dict[str, Any]  # of KVCache
    parts: tuple[int, ...]  # tokens appended at a time
    padding: tuple[int, int] | None
    options: dict[str, Any]  # of attention; "sinks" and "attn_mask" only say that there are some

    def __str__(self) -> str:
        names = [*self.settings, *self.options, *(["padding"] if self.padding else [])]
        return f"{self.head_dim}-{self.k_format}-{self.v_format}-{'-'.join(names)}"

    def cache(self, device: str, more_tokens: int = 0) -> tq.KVCache:
        """An empty cache with room for what is appended, and for so many tokens more."""
        sizes = (BATCH, KV_HEADS, self.head_dim, sum(self.parts) + more_tokens)
        return tq.KVCache(*sizes, self.k_format, self.v_format, device=device, **self.settings)

    def attention_options(self, queries: int, heads: int, positions: int) -> dict[str, Any]:
        options = dict(self.options)
        if "sinks" in options:
            options["sinks"] = torch.randn(heads)
        if "attn_mask" in options:
            options["attn_mask"] = torch.rand(BATCH, queries, positions) > 0.3
        return options


SETTINGS: list[dict[str, Any]] = [
    {"block_size": 16},
    {"block_size": 0, "sink_length": 0},
    {"block_size": 32, "residual_length": 40, "sink_length": 0},
    {"block_size": 16, "window": 40, "encode": "best"},
    {"block_size": 0, "sink_length": 9, "encode": "plain"},
    {"block_size": 8, "window": 500, "sink_length": 12},
]
# The last one has parts of four simdgroups each.
PARTS = [(70, 1, 1, 30), (33,), (1, 17, 60), (100, 2, 50), (290, 3)]
PADDING = [None, (5, 0), None, (0, 61)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"sinks": True},
    {"attn_mask": True, "scale": 0.3},
    {"sinks": True, "attn_mask": True, "softcap": 2.0},
]


def _samples() -> list[Sample]:
    names = list(fmt.FORMATS)
    pairs = list(zip(names, names[4:] + names[:4], strict=True)) * 2 + [("tq4", "tq4"), ("tq8", "tq4"), ("f16", "f16")]
    lists = (fmt.HEAD_DIMS, TYPES, TYPES[1:] + TYPES[:1] * 3, SETTINGS, PARTS, PADDING, OPTIONS)
    columns = [cycle(values) for values in lists]
    rows = zip(pairs, *columns, strict=False)  # the columns go on for ever
    return [Sample(head_dim, *pair, *rest) for pair, head_dim, *rest in rows]


SAMPLES = _samples()


def encode_on_both(
    sample: Sample, device: str, more_tokens: int = 0
) -> tuple[tq.KVCache, tq.KVCache, tuple[Tensor, Tensor]]:
    """The caches of the CPU and of the GPU after all parts, and the keys and values that went into them."""
    cpu, gpu = sample.cache("cpu", more_tokens), sample.cache(device, more_tokens)
    keys, values = [], []
    for i, tokens in enumerate(sample.parts):
        k, v = torch.randn(2, BATCH, KV_HEADS, tokens, sample.head_dim)
        keys.append((k + 0.5).to(sample.k_type))
        values.append(v.to(sample.v_type))
        padding = sample.padding if i == 0 else None
        for cache in (cpu, gpu):
            cache.append(keys[-1].to(cache.device), values[-1].to(cache.device), padding)
    return cpu, gpu, (torch.cat(keys, 2), torch.cat(values, 2))


def check_rows(got: Tensor, expected: Tensor, stored: Tensor) -> None:
    """Rows as the GPU's cache holds them, as the CPU's does, and what both were given (or the newest of it).

    The last bit of float32 decides now and then how a number rounds to half, or to which side of a threshold it falls,
    and both are then as far from it.
    """
    got, stored = got.cpu(), stored[:, :, -got.shape[2] :].float()
    size = 2**-9 * expected.norm(dim=-1)
    error, expected_error = ((x - stored).norm(dim=-1) for x in (got, expected))
    is_seen = expected.any(-1)  # and no padding
    assert (error <= expected_error + size)[is_seen].all()
    assert not got[~is_seen].any()
    is_apart = (got - expected).norm(dim=-1) > size
    assert is_apart.float().mean() < 0.03


def check_attention(q: Tensor, options: dict[str, Any], cpu: tq.KVCache, gpu: tq.KVCache) -> None:
    expected, expected_lse = tq.attention(q, cpu, return_lse=True, **options)
    moved = {name: x.to(gpu.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = tq.attention(q.to(gpu.device), gpu, return_lse=True, **moved)
    # Two computations in float32, each within the bound.
    assert relative_error(out, expected) < 2 * float32_bound(len(cpu))
    assert torch.equal(lse.cpu().isneginf(), expected_lse.isneginf())
    seen = expected_lse.isfinite()
    assert (lse.cpu() - expected_lse)[seen].abs().max() < 4e-5


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_cache(sample: Sample, gpu: str) -> None:
    cpu, on_gpu, stored = encode_on_both(sample, gpu)
    for rows in zip(on_gpu.dense(), cpu.dense(), stored, strict=True):
        check_rows(*rows)
    states = cpu.state_dict()["tensors"], on_gpu.state_dict()["tensors"]
    for name in {"k_means", "v_means"} & states[0].keys():
        assert relative_error(states[1][name], states[0][name]) < 2**-11  # half's rounding
    on_gpu.load_state_dict(cpu.state_dict())  # from here on the same bytes
    for x, y in zip(on_gpu.dense(), cpu.dense(), strict=True):
        assert relative_error(x, y) < 1e-6
    for heads, queries in ((KV_HEADS, 1), (3 * KV_HEADS, 5)):
        seen = len(cpu) if cpu.config.window is None else cpu._length - cpu._begin(queries)
        q = torch.randn(BATCH, heads, queries, sample.head_dim)
        check_attention(q, sample.attention_options(queries, heads, seen), cpu, on_gpu)


@pytest.mark.parametrize("sample", SAMPLES[::6], ids=str)
def test_a_step(sample: Sample, gpu: str) -> None:
    cpu, on_gpu, stored = encode_on_both(sample, gpu, more_tokens=10)
    for tokens in (1, 9):
        on_gpu.load_state_dict(cpu.state_dict())
        q = torch.randn(BATCH, 3 * KV_HEADS, tokens, sample.head_dim)
        kv = torch.randn(2, BATCH, KV_HEADS, tokens, sample.head_dim)
        cpu.append(*kv)
        out, _ = on_gpu.step(q.to(gpu), *kv.to(gpu))
        stored = tuple(torch.cat(both, 2) for both in zip(stored, kv, strict=True))
        for rows in zip(on_gpu.dense(), cpu.dense(), stored, strict=True):
            check_rows(*rows)
        cpu.load_state_dict(on_gpu.state_dict())
        assert relative_error(out, tq.attention(q, cpu)) < 2 * float32_bound(len(cpu))


@pytest.mark.parametrize("block_size", [0, 8])
@pytest.mark.parametrize("storage", ["tq6", "f16"])
def test_special_numbers(block_size: int, storage: str, gpu: str) -> None:
    x = torch.randn(BATCH, KV_HEADS, 41, 64) + 1
    x[:, :, 7], x[:, :, 12] = 0, x[:, :, 12] * 1e6
    x[0, :, 20, 3], x[1, :, 30, 4], x[:, 0, 40] = float("nan"), float("inf"), -1e6
    caches = [
        tq.KVCache(BATCH, KV_HEADS, 64, 48, storage, storage, device, block_size=block_size, sink_length=2)
        for device in ("cpu", gpu)
    ]
    for cache in caches:
        for part in x.split(21, 2):  # a NaN waits in the tail, others are coded as they come
            cache.append(part.to(cache.device), part.to(cache.device))
    for expected, got in zip(caches[0].dense(), caches[1].dense(), strict=True):
        got = got.cpu()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())
        rows = expected.isfinite().all(-1)
        check_rows(*(each[rows][None, None] for each in (got, expected, x)))


@pytest.mark.parametrize("causal", [True, False])
def test_lengths(causal: bool, gpu: str) -> None:
    cpu, on_gpu, _ = encode_on_both(SAMPLES[1], gpu)
    lengths = torch.tensor([20, 33], dtype=torch.int32)
    outs = []
    for cache in (cpu, on_gpu):
        cache.load_state_dict(cpu.state_dict())
        torch.manual_seed(1)
        q = torch.randn(BATCH, KV_HEADS, 3, SAMPLES[1].head_dim).to(cache.device)
        held = {"start": 0, "coded": 33, "length": 33, "lengths": lengths.to(cache.device), "causal": causal}
        outs.append(tqattn.attend(q, *cache._stores(), **held))
    for x, y in zip(*outs, strict=True):
        assert relative_error(y, x) < 2 * float32_bound(33)


def test_the_samples_have_everything() -> None:
    assert {s.head_dim for s in SAMPLES} == set(fmt.HEAD_DIMS)
    assert {s.k_format for s in SAMPLES} == {s.v_format for s in SAMPLES} == set(fmt.FORMATS)
    assert {s.k_type for s in SAMPLES} == {s.v_type for s in SAMPLES} == set(TYPES)
    assert {str(s.settings) for s in SAMPLES} == {str(s) for s in SETTINGS}
    assert {str(s.options) for s in SAMPLES} == {str(o) for o in OPTIONS}
    assert {s.parts for s in SAMPLES} == set(PARTS)


# The seeds' operators


def seed_calls(op: str, q: Tensor, head_dim: int, bits: int, nwg: int, nsg: int) -> Tensor:
    """One call of that operator, on the device of q."""
    length = 300
    x = torch.randn(2, 1, length, head_dim).to(q.device)
    rows = head_dim // 2 if op == "flash_attn_vec_tq" else head_dim
    packed = torch.zeros(2, 1, length, rows, dtype=torch.uint8, device=q.device)
    norms = torch.zeros((2, 1, length) if head_dim == 256 else (2, 1, length, 2), device=q.device)
    options: dict[str, Any] = {"mask_type": 2, "sliding_window": 280, "softcap": 5.0, "nwg": nwg}
    for side in range(2):
        if op == "flash_attn_vec_tq":
            tqattn.hadamard_quantize_kv(x[side], packed[side], norms[side], 0)
        else:
            tqattn.hadamard_quantize_kv_hb(x[side], packed[side], norms[side], 0, bits)
    if op == "flash_attn_vec_tq":
        return tqattn.flash_attn_vec_tq(q, packed[0], norms[0], packed[1], norms[1], length, 0.05, **options)
    options |= {"nsg": nsg, "fuse_fwht_pre": True}
    if op == "flash_attn_vec_hybrid":
        k = tqattn.fwht_sign_premult(x[0]).half()
        return tqattn.flash_attn_vec_hybrid(q, k, packed[1], norms[1], length, 0.05, bits, **options)
    call = getattr(tqattn, op)
    return call(q, packed[0], norms[0], packed[1], norms[1], length, 0.05, bits, **options)


@pytest.mark.parametrize(
    ("op", "bits", "nwg", "nsg"),
    [
        ("flash_attn_vec_tq", 4, 16, 1),
        ("flash_attn_vec_tq_hb", 5, 1, 4),
        ("flash_attn_vec_tq_hb_with_fused_undo", 6, 32, 4),
        ("flash_attn_vec_hybrid", 8, 4, 2),
    ],
)
@pytest.mark.parametrize("head_dim", [256, 512])
def test_the_seeds_operators(op: str, bits: int, nwg: int, nsg: int, head_dim: int, gpu: str) -> None:
    results = []
    for device in ("cpu", gpu):
        torch.manual_seed(3)
        q = torch.randn(4, head_dim).to(device)
        results.append(seed_calls(op, q, head_dim, bits, nwg, nsg))
    # A tie between two levels falls differently now and then: one code of 300 rows.
    assert relative_error(results[1], results[0]) < 2e-3
