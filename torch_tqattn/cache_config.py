"""What a KV cache is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import format as fmt

# Query tokens that may attend at once to a windowed cache: its ring keeps this many positions beyond the window.
MAX_WINDOW_QUERIES = 128

T = TypeVar("T")


def is_integer(x: object) -> bool:
    """Whether x is a number that counts; True and False, which Python takes for integers, are mistakes here."""
    return isinstance(x, int) and not isinstance(x, bool)


class _Once(Generic[T]):
    """A property of an immutable object, worked out when it is first read.

    functools.cached_property is the same with a lock before Python 3.12, which torch.compile cannot trace.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


@dataclass(frozen=True)
class CacheConfig:
    """What a cache is made of; everything but its contents.

    It never changes, so what follows from it is worked out once.
    """

    batch_size: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    k_format: str
    v_format: str
    window: int | None
    block_size: int
    residual_length: int
    encode: str
    sink_length: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_kv_heads", "capacity"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if not is_integer(fmt.check_head_dim(self.head_dim)):
            raise ValueError(f"head_dim must be an integer, got {self.head_dim!r}")
        fmt.get_format(self.k_format)
        fmt.get_format(self.v_format)
        if self.window is not None and (not is_integer(self.window) or self.window < 1):
            raise ValueError(f"window must be None (all positions) or a positive integer, got {self.window!r}")
        for name in ("block_size", "residual_length", "sink_length"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a non-negative integer, got {getattr(self, name)!r}")
        if self.residual_length and not self.block_size:
            raise ValueError(
                f"residual_length {self.residual_length} needs blocks: with block_size 0 every token is coded at once"
            )
        if self.encode not in fmt.ENCODES:
            raise ValueError(f"unknown encode {self.encode!r}; choose one of {', '.join(fmt.ENCODES)}")

    @_Once
    def formats(self) -> tuple[fmt.Format, fmt.Format]:
        return fmt.FORMATS[self.k_format], fmt.FORMATS[self.v_format]

    @_Once
    def is_coded(self) -> bool:
        return any(side.is_coded for side in self.formats)

    @_Once
    def block(self) -> int:
        """Positions coded at a time; 0 if each token is stored as it comes, as in a cache that codes nothing."""
        return self.block_size if self.is_coded else 0

    @_Once
    def sink_rows(self) -> int:
        """Rows of the tail for each sequence's first tokens; 0 in a cache that codes nothing, where all are dense."""
        return self.sink_length if self.is_coded else 0

    @_Once
    def is_ring(self) -> bool:
        return self.window is not None and self.capacity >= self.window

    @_Once
    def slots(self) -> int:
        unit = self.block or 1
        if self.is_ring and self.window is not None:
            return -(-(self.window + MAX_WINDOW_QUERIES - 1) // unit) * unit
        return self.capacity // unit * unit  # what is left of a block waits in the tail

    @_Once
    def tail_slots(self) -> int:
        """Rows of the tail's ring, which come after the sink rows."""
        return self.block + self.residual_length if self.block else 0

    def checked_balance(self, k_balance: Tensor) -> Tensor:
        """A copy of KVCache's argument; ValueError if it does not fit."""
        shape = [self.num_kv_heads, self.head_dim]
        if not isinstance(k_balance, Tensor) or k_balance.dtype != torch.float32 or list(k_balance.shape) != shape:
            given = f"{k_balance.dtype} {list(k_balance.shape)}" if isinstance(k_balance, Tensor) else repr(k_balance)
            raise ValueError(f"k_balance must be float32 [num_kv_heads, head_dim] = {shape}, got {given}")
        if not ((k_balance > 0) & k_balance.isfinite()).all():
            raise ValueError(f"k_balance must be positive and finite, got {k_balance.min()} to {k_balance.max()}")
        return k_balance.detach().clone(memory_format=torch.contiguous_format)
