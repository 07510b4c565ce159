"""The TurboQuant cache format: signs, rotation, codebooks, packings and sizes. Every backend and test takes them here.

docs/format.md describes the same format in words, complete enough to implement it elsewhere.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import tables

FORMAT_VERSION = 1
SIGN_SEED = 1
HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)
NORM_GROUP = 256  # a norm covers at most this many coordinates
ROW_ALIGNMENT = 4  # bytes: rows of codes are padded so that every backend can load whole words
DEFAULT_BLOCK_SIZE = 128
DEFAULT_SINK_LENGTH = 4  # trained models attend to their first tokens more than to any other
ENCODES = ("fast", "best", "plain")
# Scales that encode="best" tries, times the root mean square, in this order: of equally good ones the first is kept.
SCALE_MULTIPLIERS = (1.0, 0.95, 1.05, 0.9, 1.1, 0.85, 1.15, 0.8, 1.2)
HALF_MAX = 65504.0  # larger finite numbers are stored as this: a dense row never turns a number into infinity


@dataclass(frozen=True)
class Format:
    """How one side (K or V) of the cache is stored.

    A code of `bits` bits is cut into `planes`: a row holds the low plane of all coordinates, then the high plane.
    Within a plane, coordinate j's bits are at bit (j * plane_bits) % 8 of byte (j * plane_bits) // 8.
    """

    name: str
    bits: int
    planes: tuple[int, ...]

    @property
    def is_coded(self) -> bool:
        return self.name != "f16"

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one token's codes (or half-precision numbers) for one head."""
        used = sum(head_dim * plane // 8 for plane in self.planes)
        return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def norms_per_row(self, head_dim: int) -> int:
        return -(-head_dim // NORM_GROUP) if self.is_coded else 0


FORMATS = {
    f.name: f
    for f in (
        Format("f16", 16, (16,)),
        Format("tq2", 2, (2,)),
        Format("tq3", 3, (2, 1)),
        Format("tq4", 4, (4,)),
        Format("tq5", 5, (4, 1)),
        Format("tq6", 6, (4, 2)),
        Format("tq8", 8, (8,)),
        Format("tq5-byte", 5, (8,)),
        Format("tq6-byte", 6, (8,)),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`; ValueError naming the choices if there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown storage format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_head_dim(head_dim: int) -> int:
    """`head_dim` itself; ValueError naming the choices if it is not supported."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"unsupported head_dim {head_dim!r}; choose one of {', '.join(map(str, HEAD_DIMS))}")
    return head_dim


def bytes_per_token(k_format: str, v_format: str, head_dim: int, block_size: int = DEFAULT_BLOCK_SIZE) -> float:
    """Bytes that one coded token takes in one KV head, K and V together, block means included.

    Args:
        k_format, v_format: names in FORMATS.
        head_dim: one of HEAD_DIMS.
        block_size: tokens that share a mean; 0 for no means.

    Raises:
        ValueError: an unknown format or head dim, or a negative block size.
    """
    check_head_dim(head_dim)
    if block_size < 0:
        raise ValueError(f"block_size must be 0 (no means) or positive, got {block_size}")
    total = 0.0
    for side in (get_format(k_format), get_format(v_format)):
        total += side.row_bytes(head_dim) + 4 * side.norms_per_row(head_dim)
        if side.is_coded and block_size:
            total += 2 * head_dim / block_size
    return total


@lru_cache
def signs(head_dim: int) -> Tensor:
    """The rotation's signs, float32 [head_dim] of +1 and -1."""
    words = torch.tensor(tables.SIGN_WORDS, dtype=torch.int64)
    bits = (words[:, None] >> torch.arange(32)) & 1
    return (1.0 - 2.0 * bits.flatten()[:head_dim].float()).contiguous()


def hadamard_odd_order(order: int) -> Tensor:
    """Symmetric Hadamard matrix of order q + 1, q = 11 or 19: a border of ones around the Legendre symbols of i + j.

    Symmetric, so that the rotation's inverse is the same transform (Paley's first construction with rows reflected).
    """
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    legendre = torch.tensor([1.0 if i in squares else -1.0 for i in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.ones(order, order, dtype=torch.float64)
    matrix[1:, 1:] = legendre[(index[:, None] + index[None, :]) % q]
    return matrix


def odd_order(head_dim: int) -> int:
    """The factor of head_dim whose Hadamard matrix is not a power of two: 12, 20 or 1."""
    return {80: 20, 96: 12, 192: 12}.get(head_dim, 1)


@lru_cache
def hadamard(head_dim: int) -> Tensor:
    """The symmetric Hadamard matrix of order head_dim, float64, entries +1 and -1."""
    odd = odd_order(check_head_dim(head_dim))
    matrix = hadamard_odd_order(odd) if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < head_dim:
        matrix = torch.kron(matrix, sylvester)
    return matrix


@lru_cache
def levels(bits: int) -> Tensor:
    """The format's codebook, float32 [2**bits], ascending: integers times a scale (int8 up to 5 bits, else int16)."""
    if bits not in tables.INTEGER_LEVELS:
        raise ValueError(f"no codebook of {bits} bits; choose one of {', '.join(map(str, tables.INTEGER_LEVELS))}")
    scale, integers = tables.INTEGER_LEVELS[bits]
    return torch.tensor(integers, dtype=torch.float32) * torch.tensor(scale, dtype=torch.float32)


@lru_cache
def exact_levels(bits: int) -> Tensor:
    """The unrounded Lloyd-Max codebook of the seed-shaped operators, float32 [2**bits], ascending."""
    if bits not in tables.EXACT_LEVELS:
        raise ValueError(f"no seed codebook of {bits} bits; choose one of {', '.join(map(str, tables.EXACT_LEVELS))}")
    return torch.tensor(tables.EXACT_LEVELS[bits], dtype=torch.float32)


def thresholds(codebook: Tensor) -> Tensor:
    """Midpoints between neighbouring levels: a number above threshold i and not above i + 1 has code i + 1."""
    exact = codebook.cpu().double()  # Apple's GPUs have no float64
    return ((exact[1:] + exact[:-1]) / 2).float().to(codebook.device)


def pack(codes: Tensor, storage: Format) -> Tensor:
    """Codes [..., D] (uint8) as rows of bytes [..., row_bytes]."""
    head_dim = codes.shape[-1]
    planes, shift = [], 0
    for plane in storage.planes:
        part = (codes >> shift) & ((1 << plane) - 1)
        per_byte = 8 // plane
        fields = part.reshape(*codes.shape[:-1], head_dim // per_byte, per_byte)
        weights = torch.tensor([1 << (plane * i) for i in range(per_byte)], dtype=torch.int32, device=codes.device)
        planes.append((fields.int() * weights).sum(-1).to(torch.uint8))
        shift += plane
    packed = torch.cat(planes, dim=-1)
    return torch.nn.functional.pad(packed, (0, storage.row_bytes(head_dim) - packed.shape[-1]))


def unpack(packed: Tensor, storage: Format, head_dim: int) -> Tensor:
    """The codes [..., D] (uint8) in rows of bytes [..., row_bytes]."""
    codes = torch.zeros(*packed.shape[:-1], head_dim, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for plane in storage.planes:
        size = head_dim * plane // 8
        shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=packed.device)
        fields = (packed[..., start : start + size, None] >> shifts) & ((1 << plane) - 1)
        codes |= fields.reshape(*packed.shape[:-1], head_dim) << shift
        start += size
        shift += min(plane, storage.bits)
    return codes
