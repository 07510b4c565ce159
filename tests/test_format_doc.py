"""docs/format.md is complete and right: an encoder and a decoder written from it alone agree with the package.

Everything down to "The package" is numpy and the document. Keep it so: what is missing here is missing there.
"""

import json
import math
import re
import zlib
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import safetensors.numpy
import torch

import torch_tqattn

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", DOCUMENT.split(f"\n## {title}\n")[1], flags=re.M)[0]


def table(text: str) -> list[list[str]]:
    """The body of the first table in `text`, cell by cell."""
    lines = re.search(r"((?:^\|.*\n)+)", text, flags=re.M)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SIGN_WORDS = [int(word, 16) for word in re.findall(r"0x[0-9A-F]{8}\b", section("Rotation").split("```")[1])]
PLANES = {name: [int(w) for w in planes.split(",")] for name, _, planes, _ in table(section("Storage formats"))}
BITS = {name: int(bits) for name, bits, _, _ in table(section("Storage formats"))}
CODED = [name for name in BITS if name != "f16"]
MULTIPLIERS = [
    float(m) for m in re.findall(r"[\d.]*\d", section("Coding a row").split("multipliers m, with")[1].split(":", 1)[1])
][:9]
HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)


# Rotation


def splitmix64(seed: int, count: int) -> list[int]:
    full = 2**64 - 1
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & full
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        outputs.append(z ^ (z >> 31))
    return outputs


def sign_vector(head_dim: int) -> np.ndarray:
    return np.array([-1.0 if SIGN_WORDS[j // 32] >> (j % 32) & 1 else 1.0 for j in range(head_dim)])


@lru_cache
def hadamard(head_dim: int) -> np.ndarray:
    order = {96: 12, 192: 12, 80: 20}.get(head_dim, 1)
    odd = np.ones((order, order))
    squares = {i * i % (order - 1) for i in range(1, order - 1)}
    for r in range(order - 1):
        for c in range(order - 1):
            odd[1 + r, 1 + c] = 1.0 if (r + c) % (order - 1) in squares else -1.0
    a, b = np.divmod(np.arange(head_dim), head_dim // order)
    parity = np.vectorize(lambda number: int(number).bit_count() % 2)(b[:, None] & b[None, :])
    return odd[a[:, None], a[None, :]] * (1.0 - 2.0 * parity)


def rotate(x: np.ndarray) -> np.ndarray:
    head_dim = x.shape[-1]
    return ((x * sign_vector(head_dim)) @ hadamard(head_dim) / math.sqrt(head_dim)).astype(np.float32)


def unrotate(y: np.ndarray) -> np.ndarray:
    head_dim = y.shape[-1]
    with np.errstate(invalid="ignore"):
        return sign_vector(head_dim) * (y.astype(np.float64) @ hadamard(head_dim)) / math.sqrt(head_dim)


# Codebooks


def lloyd_max(bits: int) -> np.ndarray:
    """Positive levels: Newton's method on level = centroid of its cell."""
    count = 2 ** (bits - 1)
    wide = NormalDist(0, math.sqrt(3))
    levels = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)])
    density = lambda x: np.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    tail = np.vectorize(lambda x: 0.5 * math.erfc(x / math.sqrt(2)))

    def excess(levels: np.ndarray) -> np.ndarray:
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [50.0]])
        return levels - (density(edges[:-1]) - density(edges[1:])) / (tail(edges[:-1]) - tail(edges[1:]))

    for _ in range(20):
        value, jacobian, step = excess(levels), np.zeros((count, count)), 1e-6
        for i in range(3):  # a level depends on its neighbours only: three shifted differences make all columns
            shift = np.zeros(count)
            shift[i::3] = step
            change = (excess(levels + shift) - value) / step
            for column in range(i, count, 3):
                near = slice(max(column - 1, 0), column + 2)
                jacobian[near, column] = change[near]
        move = np.linalg.solve(jacobian, value)
        levels = levels - move
        if np.abs(move).max() < 1e-10:
            break
    return levels


def codebook_integers() -> dict[int, tuple[np.float32, np.ndarray]]:
    codebooks = {}
    for bits, scale, listed in table(section("Codebooks")):
        if listed == "computed":
            upper = np.round(lloyd_max(int(bits)) / float(scale)).astype(int)
        else:
            upper = np.array([int(i) for i in listed.split()])
        codebooks[int(bits)] = (np.float32(scale), np.concatenate([-upper[::-1], upper]))
    return codebooks


CODEBOOKS = codebook_integers()
LEVELS = {bits: integers.astype(np.float32) * scale for bits, (scale, integers) in CODEBOOKS.items()}


def half(x: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(x), x, np.clip(x, -65504, 65504)).astype(np.float16)


# Rows


def pack(codes: np.ndarray, name: str) -> np.ndarray:
    head_dim, parts, shift = codes.shape[-1], [], 0
    for width in PLANES[name]:
        part = np.zeros((*codes.shape[:-1], head_dim * width // 8), dtype=np.uint8)
        for j in range(head_dim):
            field = (codes[..., j] >> shift) & ((1 << width) - 1)
            part[..., j * width // 8] |= (field << (j * width % 8)).astype(np.uint8)
        parts.append(part)
        shift += width
    used = sum(part.shape[-1] for part in parts)
    parts.append(np.zeros((*codes.shape[:-1], -used % 4), dtype=np.uint8))
    return np.concatenate(parts, axis=-1)


def unpack(rows: np.ndarray, name: str, head_dim: int) -> np.ndarray:
    codes, start, shift = np.zeros((*rows.shape[:-1], head_dim), dtype=int), 0, 0
    j = np.arange(head_dim)
    for width in PLANES[name]:
        field = rows[..., start + j * width // 8].astype(int) >> (j * width % 8)
        codes |= (field & ((1 << width) - 1)) << shift
        start += head_dim * width // 8
        shift += width
    return codes


def groups(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(*rows.shape[:-1], -1, min(rows.shape[-1], 256))


def flat(x: np.ndarray) -> np.ndarray:
    """Norms as they are stored: the dimension of groups only where there are two."""
    return x[..., 0] if x.shape[-1] == 1 else x


def encode_rows(rows: np.ndarray, name: str, encode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, norms [..., groups], and every coordinate's distance (in norms) to the nearest threshold."""
    level = LEVELS[BITS[name]]
    thresholds = (level[1:].astype(np.float64) + level[:-1]) / 2
    z = groups(rows.astype(np.float64))
    with np.errstate(invalid="ignore"):
        g = np.sqrt(np.mean(z**2, axis=-1))  # float64: rows of float32 neither overflow nor vanish
        unit = z / np.where(g > 0, g, 1)[..., None]
        codes, distance, closest = np.zeros(z.shape, int), np.zeros(z.shape), np.full((*g.shape, 1), -np.inf)
        edges = np.concatenate([[-np.inf], thresholds, [np.inf]])
        for multiplier in MULTIPLIERS if encode == "best" else [1.0]:
            scaled = unit / multiplier
            tried = np.searchsorted(thresholds, scaled, side="left")
            apart = np.minimum(scaled - edges[tried], edges[np.minimum(tried + 1, len(edges) - 1)] - scaled)
            chosen = level[tried % len(level)].astype(np.float64)
            along = np.sum(chosen * unit, axis=-1, keepdims=True) / np.linalg.norm(chosen, axis=-1, keepdims=True)
            codes, distance = np.where(along > closest, tried, codes), np.where(along > closest, apart, distance)
            closest = np.maximum(along, closest)
        norms = g / np.sqrt(np.mean(level[codes % len(level)].astype(np.float64) ** 2, axis=-1))
        norms = g if encode == "plain" else np.where(g > 0, norms, 0)
    norms = np.where(np.isfinite(g), norms, np.nan).astype(np.float32)
    return codes.reshape(rows.shape), norms, distance.reshape(rows.shape)


def decode_rows(codes: np.ndarray, norms: np.ndarray, name: str) -> np.ndarray:
    values = groups(LEVELS[BITS[name]][codes]) * norms[..., None]
    return values.reshape(codes.shape)


# Whole caches


class Layout:
    """What the counters and the configuration in a file's header say about where rows are."""

    def __init__(self, config: dict, length: int) -> None:
        self.names = {"k": config["k_format"], "v": config["v_format"]}
        self.head_dim = config["head_dim"]
        self.block = 0 if set(self.names.values()) == {"f16"} else config["block_size"]
        unit, window = self.block or 1, config["window"]
        if window is not None and config["capacity"] >= window:
            self.slots = math.ceil((window + 127) / unit) * unit
        else:
            self.slots = config["capacity"] // unit * unit
        self.sinks = 0 if set(self.names.values()) == {"f16"} else config["sink_length"]
        residual = config["residual_length"]
        self.coded = max((length - 1 - residual) // self.block * self.block, 0) if self.block else length


def encode_file(
    path: Path,
    config: dict,
    k: np.ndarray,
    v: np.ndarray,
    starts: np.ndarray | None = None,
    balance: np.ndarray | None = None,
) -> None:
    """What KVCache.save would write after the tokens k, v [B, H, T, D] were appended to a cache without a window."""
    batch, _, length, _ = k.shape
    layout = Layout(config, length)
    ends = np.zeros(batch, int) if starts is None else starts  # of the padding
    hidden = (np.arange(length)[None] < ends[:, None] + layout.sinks)[:, None, :, None]
    tensors = {} if starts is None else {"starts": starts.astype(np.int32)}
    if balance is not None:
        tensors["k_balance"] = balance
        k = k * balance[:, None]
    for side, x in (("k", k), ("v", v)):
        name, rows = layout.names[side], rotate(x)
        sinks = np.zeros((*rows.shape[:2], min(layout.sinks, length), rows.shape[3]), np.float16)
        for i, end in enumerate(ends):
            held = half(rows[i, :, end : end + layout.sinks])
            sinks[i, :, : held.shape[1]] = held
        rows = half(rows).astype(np.float32) if layout.block else rows
        waiting = half(np.where(hidden, 0, rows)[:, :, layout.coded :])
        if layout.block or layout.sinks:
            tensors[f"{side}_tail"] = np.concatenate([sinks, waiting], axis=2)
        rows = rows[:, :, : layout.coded]
        if name == "f16":
            tensors[f"{side}_codes"] = half(np.where(hidden[:, :, : layout.coded], 0, rows))
            continue
        if layout.block:
            counted = np.isfinite(rows).all(-1, keepdims=True) & ~hidden[:, :, : layout.coded]
            shape = (*x.shape[:2], layout.coded // layout.block, layout.block, -1)
            count = counted.reshape(shape).sum(3)
            means = half(np.where(counted, rows, 0).reshape(shape).sum(3) / np.maximum(count, 1))
            tensors[f"{side}_means"] = means
            rows = rows - np.repeat(means.astype(np.float32), layout.block, axis=2)
        codes, norms, _ = encode_rows(np.where(hidden[:, :, : layout.coded], 0, rows), name, config["encode"])
        tensors[f"{side}_codes"], tensors[f"{side}_norms"] = pack(codes, name), flat(norms)
    header = {
        "kind": "torch_tqattn.KVCache",
        "version": 1,
        "config": config,
        "counters": {"length": length, "coded": layout.coded, "stored": 0, "first": 0},
        "crc32": {name: zlib.crc32(np.ascontiguousarray(t).tobytes()) for name, t in tensors.items()},
    }
    text = json.dumps(header)
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    safetensors.numpy.save_file(tensors, path, {"torch_tqattn": text, "crc32": str(zlib.crc32(text.encode()))})


def decode_file(path: Path) -> list[np.ndarray]:
    """K and V of the positions that the cache in a file holds, unrotated, padding as zeros."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        header = json.loads(metadata["torch_tqattn"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert header["kind"] == "torch_tqattn.KVCache"
    assert header["version"] == 1
    assert int(metadata["crc32"]) == zlib.crc32(metadata["torch_tqattn"].encode())
    assert header["crc32"] == {name: zlib.crc32(t.tobytes()) for name, t in tensors.items()}
    config, counters = header["config"], header["counters"]
    layout = Layout(config, counters["length"])
    begin = max(counters["first"], counters["stored"])
    if config["window"] is not None:
        begin = max(begin, counters["length"] - config["window"])
    positions = np.arange(begin, counters["length"])
    coded, waiting = positions[positions < counters["coded"]], positions[positions >= counters["coded"]]
    sides = []
    for side in "kv":
        name, slots = layout.names[side], coded % max(layout.slots, 1)
        rows = tensors[f"{side}_codes"][:, :, slots].astype(np.float32)
        if name != "f16":
            norms = tensors[f"{side}_norms"][:, :, slots]
            codes = unpack(tensors[f"{side}_codes"][:, :, slots], name, layout.head_dim)
            rows = decode_rows(codes, norms if norms.ndim == 4 else norms[..., None], name)
            if layout.block:
                rows = rows + tensors[f"{side}_means"][:, :, slots // layout.block].astype(np.float32)
        if layout.block:
            ring = tensors[f"{side}_tail"][:, :, min(layout.sinks, counters["length"]) :]
            rows = np.concatenate([rows, ring[:, :, waiting - counters["coded"]].astype(np.float32)], axis=2)
        ends = tensors.get("starts", np.zeros(len(rows), int))
        for i, end in enumerate(ends):
            is_sink = (positions >= end) & (positions < end + layout.sinks)
            if is_sink.any():
                rows[i][:, is_sink] = tensors[f"{side}_tail"][i][:, positions[is_sink] - end]
        dense = unrotate(rows)
        if side == "k" and "k_balance" in tensors:
            dense = dense / tensors["k_balance"][:, None]
        dense = np.where((positions[None] < ends[:, None])[:, None, :, None], 0, dense)
        sides.append(dense)
    return sides


# The package


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_config(k_format: str, v_format: str, head_dim: int, **changes: object) -> dict:
    config = {"batch_size": 2, "num_kv_heads": 2, "head_dim": head_dim, "capacity": 512}
    config |= {"k_format": k_format, "v_format": v_format, "window": None, "block_size": 128}
    return config | {"residual_length": 0, "encode": "fast", "sink_length": 4} | changes


def assert_close(got: np.ndarray, expected: np.ndarray, bound: float) -> None:
    """Row by row, relative to the row's length."""
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    difference = np.linalg.norm(np.nan_to_num(got - expected), axis=-1)
    assert np.all(difference <= bound * np.linalg.norm(np.nan_to_num(expected), axis=-1) + 1e-30)


def test_quoted_tables() -> None:
    from torch_tqattn import tables

    assert tuple(SIGN_WORDS) == tables.SIGN_WORDS
    assert [output & 0xFFFFFFFF for output in splitmix64(1, 16)] == SIGN_WORDS
    assert set(CODEBOOKS) == set(tables.INTEGER_LEVELS)
    for bits, (scale, integers) in CODEBOOKS.items():
        assert scale == np.float32(tables.INTEGER_LEVELS[bits][0])
        assert tuple(integers) == tables.INTEGER_LEVELS[bits][1]


def test_quoted_formats_and_sizes() -> None:
    assert {name: (f.bits, list(f.planes)) for name, f in torch_tqattn.FORMATS.items()} == {
        name: (BITS[name], PLANES[name]) for name in BITS
    }
    assert torch_tqattn.FORMAT_VERSION == 1
    assert tuple(MULTIPLIERS) == torch_tqattn.format.SCALE_MULTIPLIERS
    assert torch_tqattn.HEAD_DIMS == HEAD_DIMS
    rows = table(section("Shapes").split("Bytes of one side")[1])
    assert [row[0] for row in rows] == list(BITS)
    for name, *numbers in rows:
        for head_dim, (codes, norm, mean, total) in ((128, numbers[:4]), (256, numbers[4:])):
            assert int(codes) + int(norm) + int(mean) == int(total)
            assert 2 * int(total) == torch_tqattn.bytes_per_token(name, name, head_dim)
            assert int(codes) == torch_tqattn.FORMATS[name].row_bytes(head_dim)


def test_quoted_packing_example() -> None:
    block = section("Planes and packing").split("```")[1]
    examples: dict[str, str] = {}
    name = ""
    for line in block.splitlines()[1:]:
        name = line[:5].strip() or name
        examples[name] = examples.get(name, "") + re.split(r"\s{2,}", line[5:])[0] + " "
    assert list(examples) == ["tq3", "tq5"]
    j = np.arange(80)
    for name, row in examples.items():
        codes = (5 * j + j // 8) % 2 ** BITS[name]
        listed = re.search(rf"((?:\d+\s)+\d+)\sin\s+{name}", section("Planes and packing"))[1]
        assert [int(code) for code in listed.split()] == list(codes[:10])
        assert bytes.fromhex(row) == pack(codes, name).tobytes()


def test_quoted_header(tmp_path: Path) -> None:
    quoted = json.loads(section("Files").split("```json")[1].split("```")[0])
    cache = torch_tqattn.KVCache(1, 2, 128, 1024)
    cache.append(tensor(normal(1, 2, 300, 128)), tensor(normal(1, 2, 300, 128, seed=1)))
    cache.save(tmp_path / "cache")
    with safetensors.safe_open(tmp_path / "cache", "numpy") as file:
        assert set(file.metadata()) == {"torch_tqattn", "crc32"}
        header = json.loads(file.metadata()["torch_tqattn"])
    assert {key: header[key] for key in header if key != "crc32"} == {
        key: quoted[key] for key in quoted if key != "crc32"
    }


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation(head_dim: int) -> None:
    x = normal(5, head_dim)
    assert_close(torch.ops.tqattn.rotate(tensor(x)).numpy(), rotate(x), 1e-6)
    assert_close(torch.ops.tqattn.rotate(tensor(x), inverse=True).numpy(), unrotate(x), 1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 512])
@pytest.mark.parametrize("name", CODED)
def test_decoding_of_any_code(name: str, head_dim: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2 ** BITS[name], (1, 2, 40, head_dim))
    norms = np.ones((1, 2, 40, math.ceil(head_dim / 256)), np.float32)
    rows = tensor(pack(codes, name))
    side = (rows, tensor(flat(norms)), None, None)
    got = torch.ops.tqattn.decode_kv(*side, *side, name, name, head_dim, 0, 40, 40, rotated=True)
    np.testing.assert_array_equal(unpack(rows.numpy(), name, head_dim), codes)
    for decoded in got:  # a norm of 1 leaves the levels themselves: each must be the very number
        np.testing.assert_array_equal(decoded.numpy(), LEVELS[BITS[name]][codes])
    norms = np.abs(normal(*norms.shape)) * 7
    side = (rows, tensor(flat(norms)), None, None)
    got = torch.ops.tqattn.decode_kv(*side, *side, name, name, head_dim, 0, 40, 40, rotated=True)
    np.testing.assert_allclose(got[0].numpy(), decode_rows(codes, norms, name), rtol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 512])
@pytest.mark.parametrize("block_size", [0, 128])
@pytest.mark.parametrize("name", list(BITS))
def test_both_directions(name: str, block_size: int, head_dim: int, tmp_path: Path) -> None:
    """A file of the package read by the document's decoder, and a file of the document's encoder by the package."""
    config = make_config(
        name, "tq4" if name == "f16" else name, head_dim, batch_size=1, num_kv_heads=1, block_size=block_size
    )
    k = normal(1, 1, 140, head_dim) + 3 * normal(1, 1, 1, head_dim, seed=2)
    v = normal(1, 1, 140, head_dim, seed=1) * 1e-3
    cache = torch_tqattn.KVCache(**config)
    cache.append(tensor(k), tensor(v))
    cache.save(tmp_path / "theirs")
    for got, expected in zip(cache.dense(), decode_file(tmp_path / "theirs"), strict=True):
        assert_close(got.numpy(), expected, 1e-6)

    encode_file(tmp_path / "ours", config, k, v)
    loaded = torch_tqattn.KVCache.load(tmp_path / "ours")
    for got, expected in zip(loaded.dense(), decode_file(tmp_path / "ours"), strict=True):
        assert_close(got.numpy(), expected, 1e-6)

    # The two files differ by rounding alone: a code is the same unless its number lies on a threshold.
    ours = safetensors.numpy.load_file(tmp_path / "ours")
    theirs = safetensors.numpy.load_file(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert ours[key].shape == theirs[key].shape
        if ours[key].dtype == np.uint8:
            mine, other = (unpack(x[key], config[f"{key[0]}_format"], head_dim) for x in (ours, theirs))
            assert np.abs(mine - other).max() <= 1
            assert np.mean(mine != other) < (2e-3 if block_size else 1e-4)
            np.testing.assert_array_equal(pack(other, config[f"{key[0]}_format"]), theirs[key])
        else:
            # One unit in the last place of f16, and its smallest number; a norm is corrected by the codes it goes with.
            relative, least = (2.0**-10, 2.0**-24) if ours[key].dtype == np.float16 else (1e-2, 0)
            scale = np.abs(ours[key].astype(np.float32)).max(initial=0)
            np.testing.assert_allclose(ours[key], theirs[key], rtol=relative, atol=3e-6 * scale + least)


@pytest.mark.parametrize("encode", ["fast", "best", "plain"])
@pytest.mark.parametrize("name", CODED)
def test_codes_are_exact_where_the_rotation_is(name: str, encode: str) -> None:
    """Small integers rotate without rounding at D = 64 and 256, so not one code may differ."""
    for head_dim in (64, 256):
        x = np.random.default_rng(1).integers(-9, 10, (1, 1, 50, head_dim)).astype(np.float32)
        codes, norms, distance = encode_rows(rotate(x), name, encode)
        cache = torch_tqattn.KVCache(1, 1, head_dim, 50, name, name, block_size=0, encode=encode, sink_length=0)
        cache.append(tensor(x), tensor(x))
        tensors = cache.state_dict()["tensors"]
        got = unpack(tensors["k_codes"].numpy(), name, head_dim)
        sure = (distance > 1e-6) | (rotate(x) == 0)
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(got[sure], codes[sure])
        np.testing.assert_allclose(tensors["k_norms"].numpy(), flat(norms), rtol=3e-6)


@pytest.mark.parametrize("block_size", [0, 64])
@pytest.mark.parametrize("formats", [("tq8", "tq4"), ("f16", "tq5")], ids=str)
@pytest.mark.parametrize("sink_length", [0, 10, 90])
def test_sinks_padding_and_balance(sink_length: int, formats: tuple[str, str], block_size: int, tmp_path: Path) -> None:
    config = make_config(*formats, 80, block_size=block_size, sink_length=sink_length, encode="best")
    k, v, starts = normal(2, 2, 140, 80), normal(2, 2, 140, 80, seed=1), np.array([0, 133])
    balance = 0.5 + np.random.default_rng(2).random((2, 80), np.float32)
    cache = torch_tqattn.KVCache(**config, k_balance=tensor(balance))
    cache.append(tensor(k), tensor(v), left_padding=starts)
    cache.save(tmp_path / "theirs")
    encode_file(tmp_path / "ours", config, k, v, starts, balance)
    loaded = torch_tqattn.KVCache.load(tmp_path / "ours")
    ours, theirs = (safetensors.numpy.load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    np.testing.assert_array_equal(ours["k_balance"], theirs["k_balance"])
    for name, same in (("ours", loaded), ("theirs", cache)):
        for got, expected in zip(same.dense(), decode_file(tmp_path / name), strict=True):
            assert_close(got.numpy(), expected, 1e-6)
    for x, y in zip(cache.dense(), loaded.dense(), strict=True):  # codes may differ where rounding decides
        error = np.linalg.norm((x - y).numpy(), axis=-1)
        assert np.mean(error > 2e-3 * np.linalg.norm(y.numpy(), axis=-1)) < 0.02


@pytest.mark.parametrize("block_size", [0, 128])
def test_special_rows(block_size: int, tmp_path: Path) -> None:
    config = make_config("tq4", "f16", 64, block_size=block_size, residual_length=10 if block_size else 0)
    k = normal(2, 2, 200, 64)
    k[:, :, 3] = 0
    k[:, :, 5, 7] = np.nan
    k[:, :, 6, 9] = np.inf
    k[:, :, 7] *= 1e30 if block_size == 0 else 1e4
    k[:, :, 8] *= 1e-30 if block_size == 0 else 1e-6
    v = k.copy()
    v[:, :, 190] *= 1e6
    starts = np.array([0, 2])
    # The special rows are coded, not dense.
    config["sink_length"] = 0
    cache = torch_tqattn.KVCache(**config)
    cache.append(tensor(k), tensor(v), left_padding=starts)
    cache.save(tmp_path / "theirs")
    encode_file(tmp_path / "ours", config, k, v, starts)
    loaded = torch_tqattn.KVCache.load(tmp_path / "ours")
    tensors = safetensors.numpy.load_file(tmp_path / "theirs")
    if block_size == 0:
        assert np.all(tensors["k_norms"][:, :, 3] == 0)
        assert np.all(unpack(tensors["k_codes"][:, :, 3], "tq4", 64) == 7)
        assert np.isfinite(tensors["v_codes"][:, :, 190]).all()
    assert np.isnan(tensors["k_norms"][:, :, 5:7]).all()
    finite = np.delete(np.arange(200), [5, 6])
    for ours, theirs, read, loaded_side in zip(
        decode_file(tmp_path / "ours"), cache.dense(), decode_file(tmp_path / "theirs"), loaded.dense(), strict=True
    ):
        assert_close(theirs.numpy()[:, :, finite], read[:, :, finite], 1e-6)
        assert_close(loaded_side.numpy()[:, :, finite], ours[:, :, finite], 1e-6)
        assert not np.isfinite(theirs.numpy()[:, :, 5:7]).any()
        assert not np.isfinite(ours[:, :, 5:7]).any()
        assert np.all(theirs.numpy()[1, :, :2] == 0)
        # Two rounded rotations may choose two codes: they are as close as the codebook's cells are wide.
        error = np.linalg.norm(theirs.numpy()[:, :, finite] - ours[:, :, finite], axis=-1)
        assert np.all(error <= 0.05 * np.linalg.norm(ours[:, :, finite], axis=-1))


@pytest.mark.parametrize("block_size", [0, 64])
def test_ring_and_crop(block_size: int, tmp_path: Path) -> None:
    cache = torch_tqattn.KVCache(**make_config("tq8", "tq5", 80, window=100, block_size=block_size))
    x = normal(2, 2, 700, 80)
    for begin in range(0, 700, 50):
        cache.append(tensor(x[:, :, begin : begin + 50]), tensor(x[:, :, begin : begin + 50]))
    for newest in (700, 650):
        cache.save(tmp_path / "ring")
        for got, expected in zip(cache.dense(), decode_file(tmp_path / "ring"), strict=True):
            assert_close(got.numpy(), expected, 1e-6)
            assert got.shape[2] == 100
            error = np.linalg.norm(got.numpy() - x[:, :, newest - 100 : newest]) / np.linalg.norm(got.numpy())
            assert error < 0.06
        cache.crop(-50)
