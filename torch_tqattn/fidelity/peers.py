"""What others store keys and values as, written from their definitions: to be compared with, not to be used.

Each function takes and returns float32 [..., tokens, head_dim]: the numbers that are left after storing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import format as fmt

GGML_BLOCK = 32  # numbers that share a scale in llama.cpp's q8_0 and q4_0
AFFINE_GROUP = 64  # numbers that share a range in the group-affine formats
SMALLEST_ROTATION = 64  # llama.cpp rotates heads whose size is a multiple of this


@dataclass(frozen=True)
class Peer:
    """A format of another project.

    `bits` are those of one number, its share of scales included; head dims must be a multiple of `unit`.
    """

    bits: float
    unit: int
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of one token's keys (or values) for one head; ValueError if the format has no such head."""
        if head_dim % self.unit:
            raise ValueError(f"head_dim {head_dim} is not a multiple of {self.unit}")
        return head_dim * self.bits / 8


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, x / scale)


def q8_0(x: Tensor) -> Tensor:
    """llama.cpp's q8_0: 32 numbers share a half-precision scale, their largest magnitude / 127."""
    block = x.unflatten(-1, (-1, GGML_BLOCK))
    scale = block.abs().amax(-1, keepdim=True) / 127
    number = _divide(block, scale)
    away_from_zero = number.sign() * (number.abs() + 0.5).floor()
    return (away_from_zero * _half(scale)).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    """llama.cpp's q4_0: 32 numbers share a half-precision scale that makes the one of largest magnitude -8."""
    block = x.unflatten(-1, (-1, GGML_BLOCK))
    scale = block.gather(-1, block.abs().argmax(-1, keepdim=True)) / -8
    code = (_divide(block, scale) + 8.5).floor().clamp(max=15)
    return ((code - 8) * _half(scale)).flatten(-2)


def hadamard(x: Tensor, order: int) -> Tensor:
    """Sylvester's Hadamard transform of each run of `order` numbers, orthonormal, without signs: its own inverse."""
    matrix = (fmt.hadamard(order) * order**-0.5).to(x)
    return (x.unflatten(-1, (-1, order)) @ matrix).flatten(-2)


def key_rotation(head_dim: int) -> int:
    """The order of llama.cpp's rotation of keys: the largest power of two that divides the head."""
    return head_dim & -head_dim


def affine(x: Tensor, bits: int) -> Tensor:
    """Groups of 64 numbers of a token between their least and their largest, both in half precision: HQQ, quanto."""
    group = x.unflatten(-1, (-1, AFFINE_GROUP))
    low = group.amin(-1, keepdim=True)
    scale = _half((group.amax(-1, keepdim=True) - low) / (2**bits - 1))
    low = _half(low)
    code = _divide(group - low, scale).round().clamp(0, 2**bits - 1)
    return (code * scale + low).flatten(-2)


def affine_channels(x: Tensor, bits: int) -> Tensor:
    """Each channel in groups of 64 tokens between their least and their largest: KIVI's keys.

    KIVI keeps tokens dense until a group is full; here what is left over at the end is a group of its own.
    """
    tokens = x.shape[-2]
    filler = x[..., -1:, :].expand(*x.shape[:-2], -tokens % AFFINE_GROUP, x.shape[-1])
    groups = torch.cat((x, filler), dim=-2).transpose(-1, -2)
    return affine(groups, bits).transpose(-1, -2)[..., :tokens, :]


def _in_half(x: Tensor) -> Tensor:
    return _half(x.clamp(-fmt.HALF_MAX, fmt.HALF_MAX))


def _ggml(quantise: Callable[[Tensor], Tensor], bits: float) -> Peer:
    return Peer(bits, GGML_BLOCK, quantise, quantise)


def _rotated(quantise: Callable[[Tensor], Tensor], bits: float) -> Peer:
    """What llama.cpp makes of a quantised cache: keys rotated as a whole, values in runs of 64."""

    def rotated(x: Tensor, order: int) -> Tensor:
        return hadamard(quantise(hadamard(x, order)), order)

    return Peer(
        bits,
        SMALLEST_ROTATION,
        lambda x: rotated(x, key_rotation(x.shape[-1])),
        lambda x: rotated(x, SMALLEST_ROTATION),
    )


def _kivi(bits: int) -> Peer:
    return Peer(bits + 32 / AFFINE_GROUP, AFFINE_GROUP, lambda x: affine_channels(x, bits), lambda x: affine(x, bits))


PEERS = {
    "f16": Peer(16, 1, _in_half, _in_half),
    "q8_0": _ggml(q8_0, 8 + 16 / GGML_BLOCK),
    "q4_0": _ggml(q4_0, 4 + 16 / GGML_BLOCK),
    "q8_0-hadamard": _rotated(q8_0, 8 + 16 / GGML_BLOCK),
    "q4_0-hadamard": _rotated(q4_0, 4 + 16 / GGML_BLOCK),
    "affine4": Peer(4 + 32 / AFFINE_GROUP, AFFINE_GROUP, lambda x: affine(x, 4), lambda x: affine(x, 4)),
    "kivi4": _kivi(4),
    "kivi2": _kivi(2),
}
