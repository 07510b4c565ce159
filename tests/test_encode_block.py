"""encode_block.metal, executed on the CPU, against encode.metal and the CPU's operator: Metal's plans never choose it,
CUDA's do.
"""

import copy
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
from metal.specialisations import BLOCK_HEAD_DIMS, side_macros
from torch import Tensor

import torch_tqattn as tq
from torch_tqattn import format as fmt

TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
PIECE_ROWS, RUN, BOOK = 16, 8, 512  # shaders/params.h
SHADER = source.SHADERS / "encode_block.metal"


@pytest.fixture(autouse=True)
def _tools() -> None:
    needs.cpp_compiler()


def append(
    cache: tq.KVCache,
    k: Tensor,
    v: Tensor,
    *,
    is_fused: bool = True,
    mode: str = "plain",
    seed: int = 0,
    shader: Path = SHADER,
) -> None:
    """What `append` does with one token, or none, where it codes a block: in one kernel, or in encode.metal's two."""
    config, sides = cache.config, (cache._k, cache._v)
    batch, heads, tokens, head_dim = k.shape
    begin, end = cache._coded, cache._coded + config.block
    macros: dict[str, object] = {
        "TQ_HEAD_DIM": head_dim,
        **side_macros("K", config.formats[0], config.formats[0].is_coded),
        **side_macros("V", config.formats[1], config.formats[1].is_coded),
        "TQ_TAIL": 1,
        "TQ_EXACT_LEVELS": 0,
        "TQ_INPUT": TYPES[k.dtype],
        "TQ_WIDE": int(all(side.tail is not None and side.tail.data_ptr() % 16 == 0 for side in sides)),
    }
    # A cluster has one threadgroup here: it can have but one piece.
    assert config.block <= PIECE_ROWS or not is_fused
    numbers = (
        *(heads, tokens, config.slots, config.tail_slots, config.sink_rows, config.block, cache._length, begin, end),
        *(config.block, 1, 8, fmt.ENCODES.index(config.encode), cache._starts is not None),
    )
    first_slot, means = begin % config.slots, config.slots // config.block
    rings = (begin % config.tail_slots, first_slot, means, first_slot // config.block, 0 if tokens else 1)
    params = np.array(numbers, np.uint32).tobytes() + np.ones(2, np.float32).tobytes()
    params += np.array(rings, np.uint32).tobytes()
    nothing = np.zeros(16, np.uint8)
    stores = [[nothing if x is None else x for x in (side.codes, side.norms, side.means, side.tail)] for side in sides]
    starts = nothing if cache._starts is None else cache._starts
    new: list[Any] = [k.contiguous(), v.contiguous()] if tokens else [nothing, nothing]
    grid = (1, batch * heads, 2)
    if is_fused:
        more = {"TQ_PIECES": 1, "TQ_BEST": int(config.encode == "best")}
        memory = 4 + BOOK + head_dim + (1 + PIECE_ROWS) * (head_dim + 4)
        Library(compile_shader(shader, {**macros, **more}, mode)).kernel("tq_encode_block").dispatch(
            [*new, *stores[0], *stores[1], starts, params], [4 * memory], grid, (32 * (PIECE_ROWS + 1), 1, 1), seed
        )
    else:
        library = Library(compile_shader(source.SHADERS / "encode.metal", macros, mode))
        simdgroups = 2 * max(2, -(-config.block // (2 * RUN)))
        library.kernel("tq_encode").dispatch(
            [*new, *stores[0], *stores[1], starts, params],
            [4 * simdgroups * (head_dim + 1)],
            grid,
            (32 * simdgroups, 1, 1),
            seed,
        )
        library.kernel("tq_keep").dispatch([*new, stores[0][3], stores[1][3], starts, params], [], grid, (128, 1, 1))
    cache._advance(tokens, end, cache._starts)


def filled(
    k_format: str,
    v_format: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    residual_length: int = 0,
    left_padding: list[int] | None = None,
    blocks: int = 3,
    is_odd: bool = False,
    **settings: Any,
) -> tuple[tq.KVCache, Tensor, Tensor]:
    """A cache that codes its next block when the next token comes, and that token."""
    batch, heads, length = 2, 2, block_size * blocks + residual_length
    cache = tq.KVCache(
        batch,
        heads,
        head_dim,
        length + block_size,
        k_format,
        v_format,
        block_size=block_size,
        residual_length=residual_length,
        **settings,
    )
    k, v = torch.randn(2, batch, heads, length + 1, head_dim)
    k += 3 * torch.randn(head_dim)
    if is_odd:
        newest = length - residual_length
        k[0, 1, newest - 3, 5] = math.nan
        v[1, 0, newest - 2, 7] = math.inf
        k[1, 1, newest - 4 :], v[1, 1, newest - 5] = 0.0, 1e30
    k, v = k.to(dtype), v.to(dtype)
    cache.append(k[:, :, :length], v[:, :, :length], left_padding)
    return cache, k[:, :, length:], v[:, :, length:]


def check(
    k_format: str = "tq4",
    v_format: str = "tq8",
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    *,
    mode: str = "plain",
    seed: int = 0,
    **settings: Any,
) -> None:
    cache, k, v = filled(k_format, v_format, head_dim, dtype, **settings)
    fused, apart = copy.deepcopy(cache), copy.deepcopy(cache)
    append(fused, k, v, mode=mode, seed=seed)
    append(apart, k, v, is_fused=False)
    cache.append(k, v)
    assert fused._coded == apart._coded == cache._coded
    for name, buffer in fused._named_buffers().items():
        assert torch.equal(buffer.view(torch.uint8), apart._named_buffers()[name].view(torch.uint8)), name
    # encode.metal's results are test_kernels' matter: this only says that the block is where it belongs.
    for rows, expected in zip(fused.dense(), cache.dense(), strict=True):
        is_apart = (rows.nan_to_num() - expected.nan_to_num()).norm(dim=-1) > 2**-8 * expected.nan_to_num().norm(dim=-1)
        assert is_apart.float().mean() < 0.03


@pytest.mark.parametrize("head_dim", BLOCK_HEAD_DIMS)
def test_head_dims(head_dim: int) -> None:
    check("tq8", "tq4", head_dim, list(TYPES)[BLOCK_HEAD_DIMS.index(head_dim) % len(TYPES)])


@pytest.mark.parametrize(
    ("k_format", "v_format"), [("tq2", "tq3"), ("tq5", "f16"), ("tq6", "tq6-byte"), ("f16", "tq8"), ("tq4", "tq4")]
)
def test_formats(k_format: str, v_format: str) -> None:
    check(k_format, v_format)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 8},
        {"block_size": 11, "residual_length": 5},
        {"residual_length": 40},
        {"sink_length": 0},
        {"sink_length": 9, "blocks": 1},
        {"sink_length": 50},
        {"left_padding": [3, 0], "blocks": 1},
        {"left_padding": [0, 40]},
        {"left_padding": [0, 49], "encode": "plain"},
        {"encode": "best"},
        {"window": 20, "blocks": 12},
        {"is_odd": True},
        {"is_odd": True, "encode": "best"},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    check(**settings)


def test_no_new_token() -> None:
    cache, k, v = filled("tq4", "tq4", 64, torch.float16)
    cache, apart = copy.deepcopy(cache), cache
    append(cache, k[:, :, :0], v[:, :, :0])
    append(apart, k[:, :, :0], v[:, :, :0], is_fused=False)
    for name, buffer in cache._named_buffers().items():
        assert torch.equal(buffer, apart._named_buffers()[name]), name


@pytest.mark.parametrize("mode", ["race", "sanitised"])
@pytest.mark.parametrize(("k_format", "v_format"), [("tq4", "f16"), ("tq8", "tq3")])
def test_with_checks(k_format: str, v_format: str, mode: str) -> None:
    for seed in range(2):
        check(k_format, v_format, mode=mode, seed=seed, is_odd=True, sink_length=2)


@pytest.mark.parametrize(("name", "index"), [(SHADER.name, 0), (SHADER.name, 1), ("cluster.h", 1)])
def test_a_missing_barrier_is_noticed(name: str, index: int, tmp_path: Path) -> None:
    shutil.copytree(source.SHADERS, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(source.without_barrier((tmp_path / name).read_text(), index))
    cache, k, v = filled("tq4", "tq4", 64, torch.float16)
    with pytest.raises(KernelError, match=r"race|nobody has written"):
        append(cache, k, v, mode="race", shader=tmp_path / SHADER.name)
    assert len(source.barriers(SHADER.read_text())) == 2
