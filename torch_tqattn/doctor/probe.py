"""How the doctor compares: an operator's results on a device, the same in plain PyTorch, and what is exact."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import format as fmt

# Float32 rounds a number by at most half of this: what may come on top where plain PyTorch happens to round nothing.
ROUNDING = 2.0**-23
# What two encoders lose differs by less: a number on a threshold, or rounded to half, may fall to the other side.
STORED = 2.0**-10


@dataclass
class Probe:
    """Runs operators on a device with arguments from the CPU, and holds what they give against what is exact."""

    device: str
    seconds: float | None = None  # that the first call took: on a GPU, with the compilation of its shaders
    results: list[tuple[float, float]] = field(default_factory=list)  # errors and their bounds

    def call(self, name: str, *arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
        """The operator's results, and the arguments after the call, on the CPU."""
        there = [x.to(self.device, copy=True) if isinstance(x, Tensor) else x for x in arguments]
        options = {key: x.to(self.device) if isinstance(x, Tensor) else x for key, x in options.items()}
        synchronise(self.device)
        begin = time.perf_counter()
        results = getattr(torch.ops.tqattn, name)(*there, **options)
        synchronise(self.device)
        if self.seconds is None:
            self.seconds = time.perf_counter() - begin
        if isinstance(results, tuple):
            results = tuple(x.cpu() for x in results)
        elif results is not None:
            results = results.cpu()
        return results, [x.cpu() if isinstance(x, Tensor) else x for x in there]

    def compare(self, got: Tensor, plain: Tensor, exact: Tensor, rounding: float = ROUNDING) -> None:
        """Note the operator's error, and that it may be twice the error of the same in plain float32 PyTorch."""
        if (got.dtype, got.shape) != (plain.dtype, plain.shape):
            raise ValueError(f"gave {got.dtype} {list(got.shape)} instead of {plain.dtype} {list(plain.shape)}")
        self.results.append((relative_error(got, exact), 2 * relative_error(plain, exact) + rounding))

    def compare_stored(self, got: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Note by how much what storing lost of rows differs from what it loses with the reference."""
        self.results.append((abs(relative_error(got, exact) / relative_error(plain, exact) - 1), STORED))

    def worst(self) -> tuple[float, float]:
        """The error that is largest for its bound, or is no number, and that bound."""
        return max(self.results, key=lambda result: float("inf") if result[0] != result[0] else result[0] / result[1])


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[Probe], None]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def synchronise(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


def rotate_exactly(x: Tensor, inverse: bool = False) -> Tensor:
    head_dim = x.shape[-1]
    matrix = fmt.signs(head_dim).double()[:, None] * fmt.hadamard(head_dim) / head_dim**0.5
    return x.double() @ (matrix.T if inverse else matrix)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
