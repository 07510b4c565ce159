"""torch_tqattn/format.py and its tables: codebooks are what they claim to be, packings and rotations invert."""

import math
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from torch_tqattn import format as fmt
from torch_tqattn import tables

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "torch_tqattn" / "shaders" / "tables.h").read_text(encoding="utf-8")
PUBLISHED_ERRORS = {2: 0.1175, 3: 0.03455, 4: 0.009501, 5: 0.002505, 6: 0.000644, 8: 4.12e-5}
ROUNDED_BITS = tuple(PUBLISHED_ERRORS)
CODED = [storage for storage in fmt.FORMATS.values() if storage.is_coded]


def centroids(levels: np.ndarray) -> np.ndarray:
    """The mean of N(0, 1) over the cell of each level."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    return (density[:-1] - density[1:]) / (below[1:] - below[:-1])


@lru_cache
def exact(bits: int) -> np.ndarray:
    """Lloyd-Max levels: the stored ones, or Lloyd's own iteration where there are none."""
    if bits in tables.EXACT_LEVELS:
        return fmt.exact_levels(bits).double().numpy()
    levels = np.linspace(-1.5, 1.5, 2**bits)
    for _ in range(500):
        levels = centroids(levels)
    return levels


@lru_cache
def integrated_error(bits: int, rounded: bool) -> float:
    """E (X - Q(X))^2 for X ~ N(0, 1), by the trapezoidal rule."""
    levels = fmt.levels(bits).double().numpy() if rounded else exact(bits)
    x = np.linspace(-10, 10, 1_000_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float(np.sum((x - nearest) ** 2 * density) * (x[1] - x[0]))


def c_array(name: str) -> list[float]:
    body = re.search(rf"\b{name}\[\d+\] = \{{(.*?)\}};", HEADER, flags=re.S)[1]
    return [float(number.rstrip("f")) for number in re.findall(r"[-\d.][-\w.]*", body)]


# Codebooks


@pytest.mark.slow
def test_tables_are_what_the_script_writes() -> None:
    script = ROOT / "scripts" / "make_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("bits", tables.EXACT_LEVELS)
def test_exact_levels_are_centroids_of_their_cells(bits: int) -> None:
    levels = exact(bits)
    np.testing.assert_allclose(centroids(levels), levels, rtol=0, atol=5e-7)


@pytest.mark.parametrize("bits", PUBLISHED_ERRORS)
def test_error_is_the_published_one(bits: int) -> None:
    assert integrated_error(bits, rounded=False) == pytest.approx(PUBLISHED_ERRORS[bits], rel=0.002)


@pytest.mark.parametrize(("bits", "loss"), [(2, 1e-3), (3, 1e-3), (4, 1e-3), (5, 1e-2), (6, 1e-5), (8, 1e-4)])
def test_rounding_the_levels_costs_little(bits: int, loss: float) -> None:
    ratio = integrated_error(bits, rounded=True) / integrated_error(bits, rounded=False)
    assert 1 - 1e-6 < ratio < 1 + loss


@pytest.mark.parametrize("bits", ROUNDED_BITS)
def test_levels_are_integers_of_their_type(bits: int) -> None:
    scale, integers = tables.INTEGER_LEVELS[bits]
    assert len(integers) == 2**bits
    assert list(integers) == sorted(set(integers))
    assert list(integers) == [-level for level in reversed(integers)]
    assert max(integers) <= (127 if bits <= 5 else 32767)
    assert scale == float(np.float32(scale)) or f"{np.float32(scale):.9g}" == repr(scale)
    assert torch.equal(fmt.levels(bits), torch.tensor(integers).float() * torch.tensor(scale))


@pytest.mark.parametrize("bits", ROUNDED_BITS)
def test_header_has_the_same_levels(bits: int) -> None:
    scale, integers = tables.INTEGER_LEVELS[bits]
    assert c_array(f"kLevels{bits}") == list(integers)
    assert float(re.search(rf"kLevelScale{bits} = (.*?)f;", HEADER)[1]) == scale
    thresholds = fmt.thresholds(fmt.levels(bits)).double().numpy()
    np.testing.assert_allclose(c_array(f"kThresholds{bits}"), thresholds, rtol=2e-7)
    if bits in tables.EXACT_LEVELS:
        assert c_array(f"kExactLevels{bits}") == list(tables.EXACT_LEVELS[bits])
        thresholds = fmt.thresholds(fmt.exact_levels(bits)).double().numpy()
        np.testing.assert_allclose(c_array(f"kExactThresholds{bits}"), thresholds, rtol=2e-7)


def test_thresholds_separate_levels() -> None:
    codebook = fmt.levels(4)
    thresholds = fmt.thresholds(codebook)
    assert torch.equal(torch.bucketize(codebook, thresholds), torch.arange(16))
    assert torch.equal(torch.bucketize(thresholds, thresholds), torch.arange(15))  # a tie takes the lower level


def test_header_has_the_same_formats() -> None:
    listed = re.findall(r'X\("([\w-]+)", (\d+), (\d+), (\d+)\)', HEADER.split("#define TQ_CODED_FORMATS(X)")[1])
    expected = [(f.name, f.bits, f.planes[0], (*f.planes, 0)[1]) for f in CODED]
    assert [(name, int(bits), int(low), int(high)) for name, bits, low, high in listed] == expected


def test_header_has_the_same_sizes() -> None:
    for name, value in {
        "TQ_FORMAT_VERSION": fmt.FORMAT_VERSION,
        "TQ_NORM_GROUP": fmt.NORM_GROUP,
        "TQ_MAX_HEAD_DIM": max(fmt.HEAD_DIMS),
        "TQ_ROW_ALIGNMENT": fmt.ROW_ALIGNMENT,
    }.items():
        assert int(re.search(rf"#define {name} (\d+)", HEADER)[1]) == value
    head_dims = re.search(r"#define TQ_HEAD_DIMS\(X\) (.*)", HEADER)[1]
    assert tuple(int(d) for d in re.findall(r"X\((\d+)\)", head_dims)) == fmt.HEAD_DIMS
    words = re.search(r"kSignWords\[16\] = \{(.*?)\};", HEADER, flags=re.S)[1]
    assert tuple(int(w, 16) for w in re.findall(r"0x[0-9A-F]+", words)) == tables.SIGN_WORDS


# Rotation


def test_signs_never_change() -> None:
    assert tables.SIGN_WORDS[:4] == (0x89025CC1, 0x658EEC67, 0xFB32555E, 0xEE42C90B)
    first = [-1, 1, 1, 1, 1, 1, -1, -1, 1, 1, -1, -1, -1, 1, -1, 1]  # 0x5CC1, lowest bit first
    assert fmt.signs(64)[:16].tolist() == first
    assert torch.equal(fmt.signs(512)[:64], fmt.signs(64))


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_hadamard(head_dim: int) -> None:
    matrix = fmt.hadamard(head_dim)
    assert torch.equal(matrix.abs(), torch.ones(head_dim, head_dim, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, head_dim * torch.eye(head_dim, dtype=torch.float64))


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_rotation_keeps_lengths_and_inverts(head_dim: int, device: str) -> None:
    x = torch.randn(3, 5, head_dim, device=device)
    y = torch.ops.tqattn.rotate(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.ops.tqattn.rotate(y, inverse=True), x, rtol=0, atol=4e-6)
    expected = (x.cpu().double() * fmt.signs(head_dim)) @ fmt.hadamard(head_dim) / math.sqrt(head_dim)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=4e-6)


# Packing and sizes


@given(st.sampled_from(CODED), st.sampled_from(fmt.HEAD_DIMS), st.integers(0, 3), st.randoms(use_true_random=False))
def test_packing_inverts(storage: fmt.Format, head_dim: int, rows: int, random: object) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    codes = torch.randint(0, 2**storage.bits, (2, rows, head_dim), generator=generator).to(torch.uint8)
    packed = fmt.pack(codes, storage)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, storage.row_bytes(head_dim))
    assert torch.equal(fmt.unpack(packed, storage, head_dim), codes)
    used = head_dim * sum(storage.planes) // 8
    assert not packed[..., used:].any()


@pytest.mark.parametrize("storage", CODED, ids=lambda storage: storage.name)
@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_packing_puts_bits_where_the_format_says(storage: fmt.Format, head_dim: int) -> None:
    """One coordinate at a time, by arithmetic on the row as one large number."""
    for j in (0, 1, 7, 8, head_dim - 1):
        codes = torch.zeros(head_dim, dtype=torch.uint8)
        codes[j] = code = 2**storage.bits - 1
        row = int.from_bytes(bytes(fmt.pack(codes, storage).tolist()), "little")
        expected, start, shift = 0, 0, 0
        for plane in storage.planes:
            expected |= (code >> shift & (1 << plane) - 1) << (start + j * plane)
            start += head_dim * plane
            shift += plane
        assert row == expected


@pytest.mark.parametrize("storage", fmt.FORMATS.values(), ids=lambda storage: storage.name)
@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
def test_row_bytes(storage: fmt.Format, head_dim: int) -> None:
    assert sum(storage.planes) >= storage.bits
    assert all(head_dim * plane % 8 == 0 for plane in storage.planes)
    used = head_dim * sum(storage.planes) // 8
    padding = storage.row_bytes(head_dim) - used
    assert storage.row_bytes(head_dim) % fmt.ROW_ALIGNMENT == 0
    assert padding == (2 if head_dim == 80 and storage.name in ("tq3", "tq5") else 0)


@pytest.mark.parametrize("head_dim", fmt.HEAD_DIMS)
@pytest.mark.parametrize("block_size", [0, 16, 128])
def test_bytes_per_token(head_dim: int, block_size: int) -> None:
    for k in fmt.FORMATS.values():
        for v in fmt.FORMATS.values():
            expected = 0.0
            for side in (k, v):
                expected += side.row_bytes(head_dim)
                if side.is_coded:
                    expected += (8 if head_dim == 512 else 4) + (2 * head_dim / block_size if block_size else 0)
            assert fmt.bytes_per_token(k.name, v.name, head_dim, block_size) == expected


def test_bytes_per_token_is_what_a_cache_takes() -> None:
    from torch_tqattn import KVCache

    for k, v in (("tq3", "tq5"), ("f16", "tq4"), ("tq8", "tq2"), ("f16", "f16")):
        cache = KVCache(1, 3, 80, 512, k, v)
        waiting = 2 * 2 * 3 * 80 * (fmt.DEFAULT_SINK_LENGTH + 128) if (k, v) != ("f16", "f16") else 0
        assert cache.nbytes == 3 * 512 * fmt.bytes_per_token(k, v, 80) + waiting


# Wrong arguments


def choices(error: pytest.ExceptionInfo[ValueError]) -> str:
    return str(error.value).split("choose one of ")[1]


@pytest.mark.parametrize("name", ["tq7", "", "TQ4", None, 4])
def test_unknown_format(name: object) -> None:
    for call in (
        lambda: fmt.get_format(name),
        lambda: fmt.bytes_per_token(name, "tq4", 128),
        lambda: fmt.bytes_per_token("tq4", name, 128),
    ):
        with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
            call()
        assert choices(error) == ", ".join(fmt.FORMATS)


@pytest.mark.parametrize("head_dim", [0, -64, 63, 100, 1024, None])
def test_unknown_head_dim(head_dim: int | None) -> None:
    for call in (
        lambda: fmt.check_head_dim(head_dim),
        lambda: fmt.hadamard(head_dim),
        lambda: fmt.bytes_per_token("tq4", "tq4", head_dim),
    ):
        with pytest.raises(ValueError, match=re.escape(repr(head_dim))) as error:
            call()
        assert choices(error) == ", ".join(map(str, fmt.HEAD_DIMS))


def test_unknown_codebook() -> None:
    with pytest.raises(ValueError, match="no codebook of 7 bits") as error:
        fmt.levels(7)
    assert choices(error) == "2, 3, 4, 5, 6, 8"
    with pytest.raises(ValueError, match="no seed codebook of 3 bits") as error:
        fmt.exact_levels(3)
    assert choices(error) == "4, 5, 6, 8"


def test_negative_block_size() -> None:
    with pytest.raises(ValueError, match="-1"):
        fmt.bytes_per_token("tq4", "tq4", 128, -1)
