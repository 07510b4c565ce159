"""Compute the format's tables and write them where Python and the kernels read them.

    python scripts/make_tables.py           # rewrite torch_tqattn/tables.py and torch_tqattn/shaders/tables.h
    python scripts/make_tables.py --check   # exit 1 if either file differs from what would be written

Codebooks are Lloyd-Max quantisers of N(0, 1), found by Newton's method on the fixed-point equations: Lloyd's own
iteration needs tens of thousands of rounds at 8 bits. The list of storage formats comes from torch_tqattn/format.py.
"""

import argparse
import math
import sys
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BITS = (2, 3, 4, 5, 6, 8)
SEED_BITS = (4, 5, 6, 8)
SIGN_WORDS = 16  # 512 signs of 32 bits each: one for every coordinate of the largest head dim
INFINITY = 40.0  # beyond this N(0, 1) has no mass in float64


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _upper_tail(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in x])


def _cells(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of each positive level's cell."""
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [INFINITY]])
    return edges[:-1], edges[1:]


def mean_squared_error(levels: np.ndarray) -> float:
    """E (X - Q(X))^2 for X ~ N(0, 1) and the symmetric quantiser with these positive levels."""
    low, high = _cells(levels)
    mass = _upper_tail(low) - _upper_tail(high)
    first = _density(low) - _density(high)
    second = mass + low * _density(low) - high * _density(high)
    return float(2 * np.sum(second - 2 * levels * first + levels**2 * mass))


@lru_cache
def lloyd_max(bits: int) -> np.ndarray:
    """The positive half of the optimal quantiser of N(0, 1) with 2**bits levels, to about 1e-9."""
    count = 2 ** (bits - 1)
    # Panter-Dite: the optimal density of levels is that of a normal distribution three times as wide in variance.
    wide = NormalDist(0, math.sqrt(3))
    levels = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)])
    for _ in range(50):
        low, high = _cells(levels)
        mass = _upper_tail(low) - _upper_tail(high)
        centroid = (_density(low) - _density(high)) / mass
        by_low = _density(low) * (centroid - low) / mass
        by_high = _density(high) * (high - centroid) / mass
        jacobian = np.eye(count)
        for i in range(count):
            if i > 0:
                jacobian[i, i - 1 : i + 1] -= by_low[i] / 2
            if i < count - 1:
                jacobian[i, i : i + 2] -= by_high[i] / 2
        step = np.linalg.solve(jacobian, levels - centroid)
        while np.any(np.diff(np.concatenate([[0.0], levels - step])) <= 0):  # keep the levels ordered and positive
            step /= 2
        levels = levels - step
        if np.abs(step).max() < 1e-9:
            return levels
    raise RuntimeError(f"Newton's method did not converge at {bits} bits")


@lru_cache
def integer_levels(bits: int) -> tuple[np.ndarray, float]:
    """Positive levels as integers times one scale: int8 up to 5 bits, int16 above.

    At most 5 bits the scale is searched for the least mean squared error. Above, 16-bit rounding costs nothing.
    """
    exact = lloyd_max(bits)
    if bits > 5:
        scale = float(np.float32(exact[-1] / 32767))
        return np.round(exact / scale), scale
    best = (math.inf, 0.0, exact)
    for largest in range(64, 128):
        for shift in np.linspace(-0.5, 0.5, 41):
            scale = exact[-1] / (largest + shift)
            levels = np.round(exact / scale)
            if levels[-1] != largest:
                continue
            for stretch in np.linspace(0.997, 1.003, 25):
                error = mean_squared_error(levels * scale * stretch)
                if error < best[0] - 1e-15:
                    best = (error, scale * stretch, levels)
    return best[2], float(np.float32(best[1]))


def both_signs(positive: np.ndarray) -> np.ndarray:
    return np.concatenate([-positive[::-1], positive])


def splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return mixed ^ (mixed >> 31)


def sign_words(seed: int) -> list[int]:
    """Bit j of the table (word j / 32, bit j % 32) set means that coordinate j is negated.

    Word i is the low half of the i-th output of splitmix64 with this seed.
    """
    step = 0x9E3779B97F4A7C15
    return [splitmix64((seed + i * step) & 0xFFFFFFFFFFFFFFFF) & 0xFFFFFFFF for i in range(SIGN_WORDS)]


def _rows(values: list[str], per_line: int, indent: str) -> str:
    lines = [", ".join(values[i : i + per_line]) for i in range(0, len(values), per_line)]
    return "".join(f"{indent}{line},\n" for line in lines)


def _float32(value: float) -> str:
    return f"{np.float32(value):.9g}"


def _float_literal(value: float) -> str:
    text = _float32(value)
    return (text if any(c in text for c in ".e") else text + ".0") + "f"


def python_tables(signs: list[int]) -> str:
    text = '"""Codebooks and signs of the format. Written by scripts/make_tables.py: do not edit."""\n\n'
    text += f"SIGN_WORDS = (\n{_rows([f'0x{w:08X}' for w in signs], 8, '    ')})\n\n"
    text += "# bits: (scale, integer levels). A level is its integer times the scale, in float32.\n"
    text += "INTEGER_LEVELS = {\n"
    for bits in BITS:
        positive, scale = integer_levels(bits)
        levels = _rows([str(int(v)) for v in both_signs(positive)], 16, "            ")
        text += f"    {bits}: (\n        {_float32(scale)},\n        (\n{levels}        ),\n    ),\n"
    text += "}\n\n# bits: Lloyd-Max levels as they are, for the seed-shaped operators.\nEXACT_LEVELS = {\n"
    for bits in SEED_BITS:
        levels = _rows([_float32(v) for v in both_signs(lloyd_max(bits))], 8, "        ")
        text += f"    {bits}: (\n{levels}    ),\n"
    return text + "}\n"


def _thresholds(levels: np.ndarray) -> list[str]:
    rounded = levels.astype(np.float32).astype(np.float64)  # as every backend holds them, and format.py computes them
    return [_float_literal(v) for v in (rounded[1:] + rounded[:-1]) / 2]


def header(signs: list[int]) -> str:
    from torch_tqattn import format as fmt

    formats = "".join(
        f'  X("{f.name}", {f.bits}, {f.planes[0]}, {f.planes[1] if len(f.planes) > 1 else 0}) \\\n'
        for f in fmt.FORMATS.values()
        if f.bits < 16
    )
    head_dims = " ".join(f"X({d})" for d in fmt.HEAD_DIMS)
    text = (
        "// The format's tables, for the host and for the kernels. Written by scripts/make_tables.py: do not edit.\n"
        "// clang-format off\n"
        "#pragma once\n\n"
        "#ifdef __METAL_VERSION__\n#define TQ_TABLE constant\n#else\n#include <cstdint>\n"
        "#define TQ_TABLE static constexpr\n#endif\n\n"
        f"#define TQ_FORMAT_VERSION {fmt.FORMAT_VERSION}\n"
        f"#define TQ_NORM_GROUP {fmt.NORM_GROUP}\n"
        f"#define TQ_MAX_HEAD_DIM {max(fmt.HEAD_DIMS)}\n"
        f"#define TQ_ROW_ALIGNMENT {fmt.ROW_ALIGNMENT}\n"
        f"#define TQ_HALF_MAX {fmt.HALF_MAX}f\n\n"
        f"#define TQ_HEAD_DIMS(X) {head_dims}\n\n"
        "// X(name, bits of a code, bits of the low plane, bits of the high plane)\n"
        f"#define TQ_CODED_FORMATS(X) \\\n{formats.rstrip(chr(92) + chr(10) + ' ')}\n\n"
        "// Of the scale, for Encode::kBest, in the order in which they are tried.\n"
        f"TQ_TABLE float kScaleMultipliers[{len(fmt.SCALE_MULTIPLIERS)}] = {{\n"
        f"{_rows([_float_literal(m) for m in fmt.SCALE_MULTIPLIERS], 16, '    ')}}};\n\n"
        "// Bit j % 32 of word j / 32 set: coordinate j is negated.\n"
        f"TQ_TABLE uint32_t kSignWords[{SIGN_WORDS}] = {{\n"
        f"{_rows([f'0x{w:08X}u' for w in signs], 8, '    ')}}};\n"
    )
    for bits in BITS:
        positive, scale = integer_levels(bits)
        integers = both_signs(positive)
        text += (
            f"\nTQ_TABLE float kLevelScale{bits} = {_float_literal(scale)};\n"
            f"TQ_TABLE int16_t kLevels{bits}[{2**bits}] = {{\n{_rows([str(int(v)) for v in integers], 16, '    ')}}};\n"
            f"TQ_TABLE float kThresholds{bits}[{2**bits - 1}] = {{\n"
            f"{_rows(_thresholds(integers.astype(np.float32) * np.float32(scale)), 8, '    ')}}};\n"
        )
    for bits in SEED_BITS:
        exact = both_signs(lloyd_max(bits))
        text += (
            f"\nTQ_TABLE float kExactLevels{bits}[{2**bits}] = {{\n"
            f"{_rows([_float_literal(v) for v in exact], 8, '    ')}}};\n"
            f"TQ_TABLE float kExactThresholds{bits}[{2**bits - 1}] = {{\n{_rows(_thresholds(exact), 8, '    ')}}};\n"
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    arguments = parser.parse_args()
    from torch_tqattn import format as fmt

    signs = sign_words(fmt.SIGN_SEED)
    outputs = {
        ROOT / "torch_tqattn" / "tables.py": python_tables(signs),
        ROOT / "torch_tqattn" / "shaders" / "tables.h": header(signs),
    }
    stale = [path for path, text in outputs.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'differs' if arguments.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not arguments.check:
            path.write_text(outputs[path])
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
