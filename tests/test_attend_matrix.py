"""attend_matrix.metal, executed on the CPU, against the CPU's operator: Metal's plans never choose it, CUDA's do."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metal import needs, source
from metal.executed.compile import compile_shader
from metal.executed.runner import KernelError, Library
from metal.specialisations import MATRIX_HEAD_DIMS, side_macros
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt

TYPES = {torch.float16: "half", torch.bfloat16: "bfloat"}
SHADER = source.SHADERS / "attend_matrix.metal"


@pytest.fixture(autouse=True)
def _tools() -> None:
    needs.cpp_compiler()


def table_entries(storage: fmt.Format) -> int:
    if not storage.is_coded:
        return 0
    return 256 if storage.bits <= 4 else 1 << storage.bits


def is_whole(cache: tq.KVCache) -> bool:
    """As csrc/gpu/plan.cpp says."""
    config = cache.config
    return config.slots % 16 == 0 and config.block % 16 == 0 and config.formats[1].is_coded


def attend_matrix(
    cache: tq.KVCache,
    q: Tensor,
    *,
    queries: int = 8,
    splits: int = 2,
    dense_shift: int = 1,
    simdgroups: int = 2,
    is_staged: bool = True,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    mode: str = "plain",
    seed: int = 0,
    shader: Path = SHADER,
) -> tuple[Tensor, Tensor]:
    """out and lse, as tq.attention: the kernel's parts, merged here; if it has all positions, its own results."""
    config = cache.config
    batch, heads, tokens, head_dim = q.shape
    sides = (cache._k, cache._v)
    macros: dict[str, object] = {
        "TQ_HEAD_DIM": head_dim,
        **side_macros("K", config.formats[0], sides[0].means is not None),
        **side_macros("V", config.formats[1], sides[1].means is not None),
        "TQ_TAIL": int(sides[0].tail is not None),
        "TQ_EXACT_LEVELS": 0,
        "TQ_INPUT": TYPES[q.dtype],
        "TQ_QUERIES": queries,
        "TQ_OUTPUT": "float",
        "TQ_WHOLE": int(is_whole(cache)),
        "TQ_STAGED": int(is_whole(cache) and is_staged),
    }
    library = Library(compile_shader(shader, macros, mode))
    rows = tokens * heads // config.num_kv_heads
    factors = (1.0, 1.0)  # of stored norms
    numbers = (
        *(heads, config.num_kv_heads, tokens, head_dim, sides[0].codes.shape[2], config.tail_slots),
        *(config.sink_rows, config.block, cache._begin(tokens), cache._coded, cache._length, config.window or 0),
        *(1, 0 if mask is None else mask.shape[0], 1 if mask is None else mask.shape[1], splits),
    )
    ends = (batch, int(cache._starts is not None), 0, 1)
    params = np.array(numbers, np.uint32).tobytes() + np.array([head_dim**-0.5, softcap], np.float32).tobytes()
    params += np.array(ends, np.uint32).tobytes() + np.array(factors, np.float32).tobytes()
    slots = sides[0].codes.shape[2]
    mean_ring = slots // config.block if config.block else 1
    shift = config.block.bit_length() - 1 if config.block & (config.block - 1) == 0 and config.block else 0
    tiles = -(-rows // queries)
    params += np.array(
        (heads // config.num_kv_heads, tiles, cache._begin(tokens) % slots, mean_ring, shift), np.uint32
    ).tobytes()
    params += np.array([dense_shift], np.uint32).tobytes() + np.array([1 / (splits * simdgroups)], np.float32).tobytes()
    partials = torch.full((batch * heads * tokens * splits * (head_dim + 2),), math.nan)
    nothing = np.zeros(16, np.uint8)
    buffers: list[Any] = [q.contiguous()]
    for side in sides:
        buffers += [nothing if x is None else x for x in (side.codes, side.norms, side.means, side.tail)]
    buffers += [nothing if mask is None else mask.contiguous(), nothing if cache._starts is None else cache._starts]
    is_finished = splits == 1
    out, lse = torch.full((*q.shape,), math.nan), torch.full(q.shape[:3], math.nan)
    finish = np.array((is_finished, sinks is not None, 1, 1), np.uint32).tobytes()
    buffers += [nothing, partials, params, nothing if sinks is None else sinks, out, lse, finish]
    entries = max(table_entries(storage) for storage in config.formats)
    tile = 0
    for side, spread in zip(sides, (128, 32), strict=True):  # shaders/params.h has rows of so many bytes further apart
        if side.norms is not None:
            row = side.codes.shape[-1]
            tile += 16 * (row + (0 if row % spread else 16) + 4)
    first, sums = entries * 256 + queries * (head_dim // 2 + 17) * 4, queries * (head_dim + 4) * 4
    is_ahead = macros["TQ_STAGED"] != 0
    memory = first + simdgroups * max(tile, sums) if is_ahead else max(first, (simdgroups + 1) * sums)
    library.kernel("tq_attend_matrix").dispatch(
        buffers,
        [memory],
        grid=(splits, config.num_kv_heads * tiles, batch),
        threads=(32 * simdgroups, 1, 1),
        seed=seed,
    )
    if is_finished:
        return out, lse
    assert sinks is None
    count = batch * heads * tokens * splits
    sums, scales = partials[: count * head_dim].view(-1, splits, head_dim), partials[count * head_dim :]
    total, largest = scales.view(-1, splits, 2).unbind(-1)
    lse = (largest + total.log()).logsumexp(-1)
    out = ((largest - lse[:, None]).exp()[..., None] * sums).sum(1)
    # Sequence, KV head, token, head of its group.
    shape = (batch, config.num_kv_heads, tokens, heads // config.num_kv_heads)
    out, lse = out.view(*shape, head_dim).transpose(2, 3), lse.view(shape).transpose(2, 3)
    back = torch.ops.tqattn.rotate(out.reshape(batch, heads, tokens, head_dim).contiguous(), inverse=True)
    return back, lse.reshape(batch, heads, tokens)


def check(
    cache: tq.KVCache,
    q: Tensor,
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    **options: Any,
) -> None:
    """The kernel's error is that of rounding the rotated queries and the weights to half precision."""
    out, lse = attend_matrix(cache, q, mask=mask, sinks=sinks, softcap=softcap, **options)
    expected, expected_lse = tq.attention(
        q.float(), cache, attn_mask=mask, sinks=sinks, softcap=softcap, return_lse=True
    )
    seen = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert (lse - expected_lse)[seen].abs().max() <= 4e-3
    error = (out - expected)[seen].norm(dim=-1) / expected[seen].norm(dim=-1)
    assert error.max() <= 2e-3


def filled(
    k_format: str, v_format: str, head_dim: int = 128, tokens: int = 300, batch: int = 1, **options: Any
) -> tq.KVCache:
    generator = torch.Generator().manual_seed(0)
    cache = tq.KVCache(batch, 2, head_dim, max(tokens, 1000), k_format, v_format, **options)
    k, v = torch.randn(2, batch, 2, tokens, head_dim, generator=generator)
    cache.append(k + 2, v * 0.1 + 1)
    return cache


def queries_for(cache: tq.KVCache, heads: int = 8, tokens: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    config = cache.config
    generator = torch.Generator().manual_seed(1)
    return torch.randn(config.batch_size, heads, tokens, config.head_dim, generator=generator).to(dtype)


@pytest.mark.parametrize("head_dim", MATRIX_HEAD_DIMS)
@pytest.mark.parametrize(("k_format", "v_format"), [("tq4", "tq4"), ("tq8", "tq4"), ("f16", "tq8")])
def test_head_dims(head_dim: int, k_format: str, v_format: str) -> None:
    cache = filled(k_format, v_format, head_dim)
    check(cache, queries_for(cache))


@pytest.mark.parametrize("name", fmt.FORMATS)
def test_formats(name: str) -> None:
    for k_format, v_format in ((name, "tq4"), ("tq5", name)):
        cache = filled(k_format, v_format, 64, 200)
        check(cache, queries_for(cache, dtype=torch.bfloat16))


@pytest.mark.parametrize("queries", [8, 16])
@pytest.mark.parametrize(("heads", "tokens"), [(2, 1), (8, 4), (14, 3), (12, 7)])
def test_query_rows(heads: int, tokens: int, queries: int) -> None:
    cache = filled("tq6", "tq4", 64, 150)
    check(cache, queries_for(cache, heads, tokens), queries=queries)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": 16},
        {"block_size": 24, "residual_length": 9},
        {"window": 100, "block_size": 32},
        {"window": 50, "block_size": 0},
        {"sink_length": 0},
        {"block_size": 40, "sink_length": 3},
    ],
    ids=str,
)
def test_stores(options: dict[str, Any]) -> None:
    for tokens, count in ((1, 1), (5, 3), (40, 1), (333, 6)):
        cache = filled("tq4", "tq3", 64, tokens, 2, **options)
        check(cache, queries_for(cache, 6, count), splits=3)
        check(cache, queries_for(cache, 6, count), splits=3, dense_shift=0)


@pytest.mark.parametrize(("k_format", "v_format"), [("tq4", "tq4"), ("tq8", "tq3"), ("f16", "tq6")])
def test_without_memory_for_a_tile_ahead(k_format: str, v_format: str) -> None:
    cache = filled(k_format, v_format)
    check(cache, queries_for(cache), is_staged=False)


def test_padding() -> None:
    cache = tq.KVCache(3, 2, 64, 500, "tq5", "tq8", block_size=32)
    cache.append(*torch.randn(2, 3, 2, 300, 64), [0, 77, 299])
    check(cache, queries_for(cache, 4, 2))


@pytest.mark.parametrize("splits", [1, 4, 40])
def test_masks(splits: int) -> None:
    cache = filled("tq4", "tq4", 64, 200, 2)
    for shape in ((1, 1, 200), (2, 3, 200)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
        mask[..., 40:120] = False  # whole tiles
        check(cache, queries_for(cache, 4, 3), mask=mask, splits=splits)
    mask = torch.zeros(2, 1, 200, dtype=torch.bool)
    mask[1, 0, 150] = True
    check(cache, queries_for(cache, 4, 3), mask=mask, splits=splits)


def test_softcap() -> None:
    cache = filled("tq8", "tq8", 64)
    check(cache, queries_for(cache), softcap=5.0)


@pytest.mark.parametrize("head_dim", MATRIX_HEAD_DIMS)
def test_one_part(head_dim: int) -> None:
    """The kernel also does what reduce.metal does."""
    cache = filled("tq4", "tq8", head_dim, 100, 2)
    for heads, tokens in ((2, 1), (12, 3)):
        q = queries_for(cache, heads, tokens)
        check(cache, q, splits=1, simdgroups=3)
        check(cache, q, splits=1, queries=16, sinks=torch.randn(heads) + 4)
    # Nothing is seen: what has a weight is the sink, if there is one.
    mask, sinks = torch.zeros(2, 1, 100, dtype=torch.bool), torch.randn(heads)
    out, lse = attend_matrix(cache, q, splits=1, mask=mask)
    assert (out == 0).all()
    assert lse.isneginf().all()
    out, lse = attend_matrix(cache, q, splits=1, mask=mask, sinks=sinks)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[:, None].expand(2, -1, tokens))


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_many_blocks(block_size: int) -> None:
    """More than a tile of means."""
    cache = filled("tq4", "tq4", 64, 40 * block_size // 2 + 7, block_size=block_size)
    for splits in (1, 3):
        check(cache, queries_for(cache, 6, 2), splits=splits, simdgroups=1)
    cache = filled("tq8", "tq6", 64, 2000, block_size=block_size, window=1000)  # a ring, which has turned round
    check(cache, queries_for(cache, 6, 2), splits=1)


@pytest.mark.parametrize("size", [1e-4, 1e3, 3e4])
def test_sizes(size: float) -> None:
    """Neither queries nor values have to be near 1: weights are kept relative to the values' norms."""
    cache = tq.KVCache(1, 2, 64, 500, "tq4", "tq4", sink_length=0, block_size=0)
    k, v = torch.randn(2, 1, 2, 300, 64)
    growth = torch.logspace(0, 1, 300)[:, None]
    cache.append(k / min(size, 1e3), v * size * growth)
    check(cache, queries_for(cache) * min(size, 1e3), simdgroups=1)


def test_zeros() -> None:
    cache = tq.KVCache(1, 2, 64, 500, "tq4", "tq4", block_size=0)
    v = torch.randn(1, 2, 300, 64)
    v[:, :, ::2] = 0
    cache.append(torch.zeros(1, 2, 300, 64), v)
    check(cache, queries_for(cache))


def test_not_a_number_stays() -> None:
    cache = tq.KVCache(1, 2, 64, 500, "tq4", "tq4", block_size=0)
    k, v = torch.randn(2, 1, 2, 300, 64)
    v[0, 0, 100] = math.nan
    cache.append(k, v)
    out, _ = attend_matrix(cache, queries_for(cache))
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()


@pytest.mark.parametrize("queries", [8, 16])
@pytest.mark.parametrize("block_size", [0, 32])
@pytest.mark.parametrize("v_format", ["f16", "tq4"])
def test_a_query_does_not_know_what_it_may_not_see(v_format: str, block_size: int, queries: int) -> None:
    """NaN is what the last of four tokens has, and one that a mask hides from the second."""
    cache = tq.KVCache(1, 2, 64, 100, "tq4", v_format, sink_length=0, block_size=block_size)
    k, v = torch.randn(2, 1, 2, 75, 64)
    v[:, :, [70, 74]] = math.nan
    cache.append(k, v)
    mask = torch.ones(1, 4, 75, dtype=torch.bool)
    mask[:, 1, 70] = False
    q = queries_for(cache, 6, 4)
    out, lse = attend_matrix(cache, q, mask=mask, queries=queries)
    assert out.isnan().all(-1).equal(torch.tensor([True, False, True, True]).expand(1, 6, 4))
    expected, expected_lse = tq.attention(q.float(), cache, attn_mask=mask, return_lse=True)
    assert (out - expected)[:, :, 1].norm() < 2e-3 * expected[:, :, 1].norm()
    assert (lse - expected_lse).abs().max() < 4e-3


@pytest.mark.parametrize("mode", ["race", "sanitised"])
@pytest.mark.parametrize(
    ("k_format", "v_format", "head_dim", "queries"),
    [("tq4", "tq4", 128, 8), ("tq8", "tq3", 64, 16), ("f16", "tq6", 64, 8), ("tq5", "f16", 192, 8)],
)
def test_with_checks(k_format: str, v_format: str, head_dim: int, queries: int, mode: str) -> None:
    cache = filled(k_format, v_format, head_dim, 90, block_size=32, sink_length=2)
    for seed in range(2):
        q = queries_for(cache, 6, 4)
        check(cache, q, queries=queries, mode=mode, seed=seed, simdgroups=3)


@pytest.mark.parametrize(
    ("name", "index"), [*((SHADER.name, index) for index in range(4)), ("matrix.h", 0), ("cluster.h", 0)]
)
def test_a_missing_barrier_is_noticed(name: str, index: int, tmp_path: Path) -> None:
    shutil.copytree(source.SHADERS, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(source.without_barrier((tmp_path / name).read_text(), index))
    shader = tmp_path / SHADER.name
    cache = filled("tq4", "tq4", 64, 400)
    q, is_staged = queries_for(cache), (name, index) != (SHADER.name, 2)  # else that one is not needed
    with pytest.raises(KernelError, match=r"race|nobody has written"):
        attend_matrix(cache, q, mode="race", shader=shader, simdgroups=8, splits=1, is_staged=is_staged)
    assert len(source.barriers(SHADER.read_text())) == 4
