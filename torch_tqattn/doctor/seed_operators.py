"""The doctor's checks of the seed-shaped operators."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_seed
from .probe import Check, Probe, random, rotate_exactly

HEAD_DIMS = (256, 512)
BITS = (4, 5, 6, 8)
SLOTS = 640  # of a store
LENGTH = 607  # tokens that it has seen


@dataclass
class Example:
    """Queries of 4 heads, and stores for 2 KV heads that the reference has filled on the CPU: a ring of SLOTS tokens.

    Bits are those of the codes; 16 are half-precision rows.
    """

    head_dim: int
    k_bits: int
    v_bits: int
    ring_start: int = 50

    def __post_init__(self) -> None:
        self.q = random(4, self.head_dim, seed=2)
        k, v = random(2, 2, SLOTS, self.head_dim)
        self.k, self.v = self.stored(k, self.k_bits), self.stored(v, self.v_bits)

    def stored(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        if bits == 16:
            return reference.rotate(x).half(), None
        packed, norms = empty_store(self.head_dim, bits)
        quantise(reference_seed, x, packed, norms, bits)
        return packed, norms

    def exact(self, rotate_q: bool, options: dict[str, Any]) -> Tensor:
        """What attention gives, still rotated."""
        first = max(0, LENGTH - options["sliding_window"])
        slots = (torch.arange(first, LENGTH) + self.ring_start) % SLOTS
        k, v = (
            wide_rows(store, norms, bits, self.head_dim)[None, :, slots]
            for (store, norms), bits in ((self.k, self.k_bits), (self.v, self.v_bits))
        )
        q = rotate_exactly(self.q) if rotate_q else self.q.double()
        visible = torch.ones(1, 1, len(slots), dtype=torch.bool)
        scale, softcap = options["scale"], options["softcap"]
        return reference.softmax_attention(q[None, :, None], k, v, visible, scale, softcap, None)[0][0, :, 0]


def empty_store(head_dim: int, bits: int) -> tuple[Tensor, Tensor]:
    packed = torch.zeros(2, SLOTS, head_dim // 2 if bits == 4 else head_dim, dtype=torch.uint8)
    return packed, torch.zeros((2, SLOTS) if head_dim == 256 else (2, SLOTS, 2))


def quantise(where: Any, x: Tensor, packed: Tensor, norms: Tensor, bits: int, position: int = 0) -> Any:
    """Call the quantiser for these bits, as an attribute of `where` or, if that is a probe, on its device."""
    name, width = ("hadamard_quantize_kv", ()) if bits == 4 else ("hadamard_quantize_kv_hb", (bits,))
    run = partial(where.call, name) if isinstance(where, Probe) else getattr(where, name)
    return run(x, packed, norms, position, *width, True)


def wide_rows(store: Tensor, norms: Tensor | None, bits: int, head_dim: int) -> Tensor:
    """The float64 rows, still rotated, that all slots of a seed-shaped store stand for."""
    wide = None if norms is None else norms.double()
    return reference_seed._seed_rows(store, wide, bits, head_dim, 1.0, torch.arange(SLOTS)).double()


def check_quantise(probe: Probe, head_dim: int, bits: int) -> None:
    x = random(2, SLOTS, head_dim)
    stores = [empty_store(head_dim, bits) for _ in range(2)]
    _, after = quantise(probe, x, *stores[0], bits, position=70)  # around the ring
    quantise(reference_seed, x, *stores[1], bits, position=70)
    got, plain = wide_rows(after[1], after[2], bits, head_dim), wide_rows(*stores[1], bits, head_dim)
    probe.compare_stored(got, plain, rotate_exactly(x).roll(70, 1))


def check_attention(probe: Probe, name: str, head_dim: int, k_bits: int, v_bits: int) -> None:
    example = Example(head_dim, k_bits, v_bits)
    (k, k_norms), (v, v_norms) = example.k, example.v
    stores = (k, v, v_norms) if k_bits == 16 else (k, k_norms, v, v_norms)
    options = {"scale": head_dim**-0.5, "mask_type": 2, "sliding_window": 400, "softcap": 5.0}
    options["ring_start"] = example.ring_start
    rotate_q = name != "flash_attn_vec_tq"
    if rotate_q:
        options |= {"codebook_bits": 8 if v_bits == 16 else v_bits, "fuse_fwht_pre": True}
    got, _ = probe.call(name, example.q, *stores, LENGTH, **options)
    exact = example.exact(rotate_q, options)
    if name.endswith("undo"):
        exact = rotate_exactly(exact, inverse=True)
    probe.compare(got, getattr(reference_seed, name)(example.q, *stores, LENGTH, **options), exact)


def check_reduce(probe: Probe, name: str, head_dim: int) -> None:
    rows, parts = 4, 16
    sums = torch.stack([1 + random(rows, parts).square(), 3 * random(rows, parts, seed=1)], -1)
    tmp = torch.cat([random(rows * parts * head_dim, seed=2), sums.flatten()])
    got, _ = probe.call(name, tmp, rows, head_dim, parts)
    exact = reference_seed.flash_attn_vec_reduce(tmp.double(), rows, head_dim, parts)
    if name.endswith("undo"):
        exact = rotate_exactly(exact, inverse=True)
    probe.compare(got, getattr(reference_seed, name)(tmp, rows, head_dim, parts), exact)


def check_fwht(probe: Probe, name: str, head_dim: int) -> None:
    x = random(5, head_dim)
    got, _ = probe.call(name, x)
    exact = rotate_exactly(x, inverse=name.endswith("undo"))
    probe.compare(got, getattr(reference_seed, name)(x), exact)


def attentions() -> Iterator[tuple[str, int, int]]:
    """Operator, bits of keys and bits of values."""
    yield "flash_attn_vec_tq", 4, 4
    for name in ("flash_attn_vec_tq_hb", "flash_attn_vec_tq_hb_with_fused_undo"):
        yield from ((name, bits, bits) for bits in BITS if bits > 4)
    yield from (("flash_attn_vec_hybrid", 16, bits) for bits in (*BITS, 16) if bits > 4)


def checks() -> Iterator[Check]:
    for head_dim in HEAD_DIMS:
        for name in ("fwht_sign_premult", "fwht_sign_undo"):
            yield Check(f"{name} D={head_dim}", partial(check_fwht, name=name, head_dim=head_dim))
        for bits in BITS:
            name = "hadamard_quantize_kv" + ("_hb" if bits > 4 else "")
            yield Check(f"{name} D={head_dim} {bits} bits", partial(check_quantise, head_dim=head_dim, bits=bits))
        for name, k_bits, v_bits in attentions():
            run = partial(check_attention, name=name, head_dim=head_dim, k_bits=k_bits, v_bits=v_bits)
            yield Check(f"{name} D={head_dim} {k_bits}/{v_bits}", run)
        for name in ("flash_attn_vec_reduce", "flash_attn_vec_reduce_tq_hb_undo"):
            yield Check(f"{name} D={head_dim}", partial(check_reduce, name=name, head_dim=head_dim))
