"""The seed-shaped operators against float64 decoding and attention written from their definitions."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from oracle import exact_attention, float32_bound, relative_error
from torch import Tensor

from torch_tqattn import format as fmt

ops = torch.ops.tqattn

HALF_ULP = 2.0**-24  # rounding to float32 changes a number by at most this, relatively
HEAD_DIMS = [256, 512]
HIGHER_BITS = [5, 6, 8]
ALL_BITS = [4, *HIGHER_BITS]
SCALE = 0.07  # not 1 / sqrt(head_dim): the operators take it as given


@lru_cache
def rotation(head_dim: int) -> Tensor:
    """float64 R, for rows x @ R: signs, then the Sylvester-Hadamard matrix over sqrt(head_dim)."""
    common = torch.arange(head_dim)[:, None] & torch.arange(head_dim)
    parity = sum((common >> bit) & 1 for bit in range(9)) % 2
    return fmt.signs(head_dim).double()[:, None] * (1.0 - 2.0 * parity) / math.sqrt(head_dim)


def rotation_bound(head_dim: int) -> float:
    # Each butterfly stage, and each of signs, normalisation and the stored result, rounds every number once.
    return (math.log2(head_dim) + 3) * HALF_ULP


def unpacked(packed: Tensor, bits: int) -> Tensor:
    packed = packed.cpu().long()
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2) if bits == 4 else packed


def decoded(packed: Tensor, norms: Tensor, bits: int, scale_factor: float = 1.0) -> Tensor:
    """float64 rows, still rotated: 256 stores lengths, 512 two root mean squares times the scale factor."""
    norms = norms.cpu().double()
    factors = norms[..., None] / 16 if norms.dim() == 2 else norms.repeat_interleave(256, dim=-1) / scale_factor
    return fmt.exact_levels(bits).double()[unpacked(packed, bits)] * factors


@dataclass
class Side:
    """One store, and the float64 rows [kv_heads, capacity, head_dim] that it stands for, rotated."""

    packed: Tensor
    norms: Tensor | None
    dense: Tensor

    def rolled(self, shift: int) -> "Side":
        norms = None if self.norms is None else self.norms.roll(shift, 1)
        return Side(self.packed.roll(shift, 1), norms, self.dense.roll(shift, 1))


def random_side(device: str, bits: int, kv_heads: int, capacity: int, head_dim: int, scale_factor: float = 1.0) -> Side:
    """Any codes and any norms, not only those that an encoder writes; bits 16 for half-precision rows."""
    if bits == 16:
        rows = torch.randn(kv_heads, capacity, head_dim).half()
        return Side(rows.to(device), None, rows.double())
    row = head_dim // 2 if bits == 4 else head_dim
    packed = torch.randint(0, 256 if bits == 4 else 2**bits, (kv_heads, capacity, row), dtype=torch.uint8)
    groups = () if head_dim == 256 else (2,)
    norms = (16.0 if head_dim == 256 else scale_factor) * (0.3 + torch.rand(kv_heads, capacity, *groups))
    return Side(packed.to(device), norms.to(device), decoded(packed, norms, bits, scale_factor))


def attend(op: str, q: Tensor, k: Side, v: Side, kv_seq_len: int, bits: int, **options: Any) -> Tensor:
    options.setdefault("scale", SCALE)
    if op != "flash_attn_vec_tq":
        options["codebook_bits"] = bits
    stores = (k.packed, v.packed, v.norms) if op == "flash_attn_vec_hybrid" else (k.packed, k.norms, v.packed, v.norms)
    return getattr(ops, op)(q, *stores, kv_seq_len, **options)


def expected(
    q: Tensor,
    k: Side,
    v: Side,
    kv_seq_len: int,
    *,
    scale: float = SCALE,
    mask_type: int = 0,
    sliding_window: int = 0,
    softcap: float = 0.0,
    ring_start: int = 0,
) -> Tensor:
    """What attention of rotated queries [heads, head_dim] gives, rotated: float64 on the CPU."""
    held = (ring_start + torch.arange(kv_seq_len)) % k.dense.shape[1]
    window = sliding_window if mask_type == 2 and sliding_window > 0 else None
    rows = (k.dense[None, :, held], v.dense[None, :, held])
    return exact_attention(q[None, :, None], *rows, scale=scale, softcap=softcap, window=window)[0][0, :, 0]


def sides(op: str, bits: int, device: str, *shape: int, scale_factor: float = 1.0) -> tuple[Side, Side]:
    k_bits = 16 if op == "flash_attn_vec_hybrid" else bits
    return (
        random_side(device, k_bits, *shape, scale_factor=scale_factor),
        random_side(device, bits, *shape, scale_factor=scale_factor),
    )


# Operator and bits of its codes; hybrid with 16 has half-precision values too, and ignores codebook_bits.
ROTATED_OUT = [
    ("flash_attn_vec_tq", 4),
    *(("flash_attn_vec_tq_hb", bits) for bits in HIGHER_BITS),
    *(("flash_attn_vec_hybrid", bits) for bits in (*HIGHER_BITS, 16)),
]
every_operator = pytest.mark.parametrize(("op", "bits"), ROTATED_OUT)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
ONE_OF_EACH = [("flash_attn_vec_tq", 4), ("flash_attn_vec_tq_hb", 6), ("flash_attn_vec_hybrid", 8)]
each_kind = pytest.mark.parametrize(("op", "bits"), ONE_OF_EACH)


def codebook_bits(bits: int) -> int:
    return 8 if bits == 16 else bits


# Rotation


@every_head_dim
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_premult_and_undo_are_the_rotation_and_its_inverse(device: str, head_dim: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, head_dim)
    given = x.to(device)
    kept = given.clone()
    matrix = rotation(head_dim)
    for op, exact in ((ops.fwht_sign_premult, matrix), (ops.fwht_sign_undo, matrix.T)):
        out = op(given)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert relative_error(out, x.double() @ exact) <= rotation_bound(head_dim)
        assert out.numel() == 0 or out.data_ptr() != given.data_ptr()
    assert torch.equal(given, kept)
    back = ops.fwht_sign_undo(ops.fwht_sign_premult(given))
    assert relative_error(back, x) <= 2 * rotation_bound(head_dim)


def test_rotation_takes_rows_that_are_not_contiguous(device: str) -> None:
    x = torch.randn(256, 6, device=device)
    exact = x.T.cpu().double() @ rotation(256)
    assert relative_error(ops.fwht_sign_premult(x.T), exact) <= rotation_bound(256)


# Quantisation


def quantise(x: Tensor, packed: Tensor, norms: Tensor, write_pos: int, bits: int, **options: Any) -> None:
    if bits == 4:
        ops.hadamard_quantize_kv(x, packed, norms, write_pos, **options)
    else:
        ops.hadamard_quantize_kv_hb(x, packed, norms, write_pos, bits, **options)


def empty_store(device: str, bits: int, kv_heads: int, capacity: int, head_dim: int) -> tuple[Tensor, Tensor]:
    row = head_dim // 2 if bits == 4 else head_dim
    groups = () if head_dim == 256 else (2,)
    packed = torch.full((kv_heads, capacity, row), 7, dtype=torch.uint8, device=device)
    return packed, torch.full((kv_heads, capacity, *groups), -3.0, device=device)


def assert_same_store(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bits: int) -> None:
    """Equal but for the order of sums: norms to rounding, codes but for a coordinate that is next to a midpoint."""
    torch.testing.assert_close(a[1], b[1], rtol=512 * HALF_ULP, atol=0)
    differs = unpacked(a[0], bits) != unpacked(b[0], bits)
    assert differs.sum() <= differs.numel() / 1000


@every_head_dim
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("scale_factor", [1.0, 16.0, 0.0])
def test_codes_are_the_nearest_levels_and_norms_the_lengths(
    device: str, bits: int, head_dim: int, scale_factor: float
) -> None:
    kv_heads, tokens = 3, 40
    x = torch.randn(kv_heads, tokens, head_dim) * torch.logspace(-3, 3, tokens)[:, None]
    packed, norms = empty_store(device, bits, kv_heads, tokens, head_dim)
    given = x.to(device)
    kept = given.clone()
    quantise(given, packed, norms, 0, bits, scale_factor_d512=scale_factor)
    assert torch.equal(given, kept)

    groups = (x.double() @ rotation(head_dim)).unflatten(-1, (-1, 256))
    rms = groups.square().mean(-1).sqrt()  # [kv_heads, tokens, groups]
    stored = rms[..., 0] * 16 if head_dim == 256 else rms * (scale_factor or 1.0)
    # A sum of n squares is off by at most n roundings, its root by half of them; the rotation adds its own.
    norm_bound = 128 * HALF_ULP + rotation_bound(head_dim) * math.sqrt(head_dim / 256)
    torch.testing.assert_close(norms.cpu().double(), stored, rtol=norm_bound, atol=0)

    levels = fmt.exact_levels(bits).double()
    normalised = groups / rms[..., None]
    codes = unpacked(packed, bits).unflatten(-1, (-1, 256))
    chosen = (levels[codes] - normalised).abs()
    best = torch.bucketize(normalised, (levels[1:] + levels[:-1]) / 2)
    # Only a coordinate nearer to a midpoint than it is itself rounded may fall to the other side of it.
    rounding = rotation_bound(head_dim) * math.sqrt(head_dim) + 8 * norm_bound
    assert ((chosen - (levels[best] - normalised).abs()) <= 2 * rounding).all()
    assert (codes != best).sum() <= codes.numel() / 1000


@every_head_dim
@pytest.mark.parametrize("bits", ALL_BITS)
def test_distortion_is_that_of_the_best_codebook(device: str, bits: int, head_dim: int) -> None:
    x = torch.randn(4, 64, head_dim)
    packed, norms = empty_store(device, bits, 4, 64, head_dim)
    quantise(x.to(device), packed, norms, 0, bits)
    error = relative_error(decoded(packed, norms, bits) @ rotation(head_dim).T, x) ** 2
    # Panter and Dite: the best n levels for normal numbers leave sqrt(3) pi / (2 n^2) for large n, less for small n.
    limit = math.sqrt(3) * math.pi / 2 / 4**bits
    assert 0.8 * limit < error < 1.05 * limit


@every_head_dim
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_sliding", [False, True])
def test_quantise_writes_its_positions_and_nothing_else(
    device: str, bits: int, head_dim: int, is_sliding: bool
) -> None:
    capacity, write_pos, tokens = 8, 5 + 16 * is_sliding, 3 + 2 * is_sliding
    x = torch.randn(2, tokens, head_dim, device=device)
    packed, norms = empty_store(device, bits, 2, capacity, head_dim)
    untouched_packed, untouched_norms = packed.clone(), norms.clone()
    quantise(x, packed, norms, write_pos, bits, is_sliding=is_sliding)

    slots = [(write_pos + i) % capacity for i in range(tokens)]
    others = [slot for slot in range(capacity) if slot not in slots]
    assert torch.equal(packed[:, others], untouched_packed[:, others])
    assert torch.equal(norms[:, others], untouched_norms[:, others])
    one_packed, one_norms = empty_store(device, bits, 2, capacity, head_dim)
    for i in range(tokens):  # [kv_heads, head_dim]: one token at a time
        quantise(x[:, i], one_packed, one_norms, write_pos + i, bits, is_sliding=is_sliding)
    assert_same_store((packed, norms), (one_packed, one_norms), bits)


@pytest.mark.parametrize("bits", [4, 6])
def test_more_tokens_than_a_ring_holds_leave_the_last_ones(device: str, bits: int) -> None:
    x = torch.randn(2, 11, 256, device=device)
    packed, norms = empty_store(device, bits, 2, 4, 256)
    quantise(x, packed, norms, 3, bits, is_sliding=True)
    last_packed, last_norms = empty_store(device, bits, 2, 4, 256)
    quantise(x[:, 7:], last_packed, last_norms, 10, bits, is_sliding=True)
    assert_same_store((packed, norms), (last_packed, last_norms), bits)


@every_head_dim
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_without_a_direction_or_of_extreme_length(device: str, bits: int, head_dim: int) -> None:
    x = torch.randn(1, 4, head_dim)
    # Squares of the second and the third leave float32; lengths do not.
    x *= torch.tensor([0.0, 1e-30, 1e30, 1.0])[:, None]
    x[0, 3, 5] = math.nan
    packed, norms = empty_store(device, bits, 1, 4, head_dim)
    quantise(x.to(device), packed, norms, 0, bits)
    rows = decoded(packed, norms, bits)[0] @ rotation(head_dim).T
    assert torch.equal(rows[0], torch.zeros(head_dim, dtype=torch.float64))
    for row in (1, 2):
        assert relative_error(rows[row], x[0, row]) ** 2 < 1.5 * math.sqrt(3) * math.pi / 2 / 4**bits
    assert norms[:, 3].isnan().all()


@every_head_dim
def test_quantise_takes_tokens_that_are_not_contiguous(device: str, head_dim: int) -> None:
    x = torch.randn(5, 2, head_dim, device=device).transpose(0, 1)
    stores = [empty_store(device, 5, 2, 5, head_dim) for _ in range(2)]
    quantise(x, *stores[0], 0, 5)
    quantise(x.contiguous(), *stores[1], 0, 5)
    assert_same_store(*stores, 5)


# Attention


@every_operator
@every_head_dim
@pytest.mark.parametrize(
    ("heads", "kv_heads", "kv_seq_len", "capacity", "softcap"),
    [(8, 2, 77, 100, 0.0), (3, 3, 1, 1, 0.0), (5, 1, 600, 600, 3.0)],
)
def test_attention_over_the_decoded_store(
    device: str,
    op: str,
    bits: int,
    head_dim: int,
    heads: int,
    kv_heads: int,
    kv_seq_len: int,
    capacity: int,
    softcap: float,
) -> None:
    scale_factor = 16.0
    k, v = sides(op, bits, device, kv_heads, capacity, head_dim, scale_factor=scale_factor)
    q = torch.randn(heads, head_dim)
    options = {"softcap": softcap, "scale_factor_d512": scale_factor}
    out = attend(op, q.to(device), k, v, kv_seq_len, codebook_bits(bits), **options)
    assert out.shape == q.shape
    assert out.dtype == torch.float32
    assert relative_error(out, expected(q, k, v, kv_seq_len, softcap=softcap)) <= float32_bound(kv_seq_len)


@each_kind
def test_scale_factor_zero_stands_for_one(device: str, op: str, bits: int) -> None:
    k, v = sides(op, bits, device, 2, 20, 512)
    q = torch.randn(4, 512, device=device)
    one, zero = (attend(op, q, k, v, 20, bits, scale_factor_d512=factor) for factor in (1.0, 0.0))
    assert torch.equal(one, zero)


@pytest.mark.parametrize(
    ("op", "bits"), [*ROTATED_OUT[1:], *(("flash_attn_vec_tq_hb_with_fused_undo", b) for b in HIGHER_BITS)]
)
@every_head_dim
def test_fused_rotations_are_the_separate_ones(device: str, op: str, bits: int, head_dim: int) -> None:
    kv_seq_len = 90
    k, v = sides(op, bits, device, 2, 100, head_dim)
    q = torch.randn(6, head_dim)
    given = q.to(device)
    matrix = rotation(head_dim)
    exact = expected(q.double() @ matrix, k, v, kv_seq_len) @ matrix.T
    undo = (lambda y: y) if "undo" in op else ops.fwht_sign_undo
    bound = float32_bound(kv_seq_len)
    separate = undo(attend(op, ops.fwht_sign_premult(given), k, v, kv_seq_len, codebook_bits(bits)))
    assert relative_error(separate, exact) <= bound
    fused = undo(attend(op, given, k, v, kv_seq_len, codebook_bits(bits), fuse_fwht_pre=True))
    assert relative_error(fused, exact) <= bound


@every_head_dim
def test_four_bits_between_premult_and_undo(device: str, head_dim: int) -> None:
    k, v = sides("flash_attn_vec_tq", 4, device, 2, 50, head_dim)
    q = torch.randn(4, head_dim)
    matrix = rotation(head_dim)
    rotated = attend("flash_attn_vec_tq", ops.fwht_sign_premult(q.to(device)), k, v, 50, 4)
    exact = expected(q.double() @ matrix, k, v, 50) @ matrix.T
    assert relative_error(ops.fwht_sign_undo(rotated), exact) <= float32_bound(50)


@every_head_dim
@pytest.mark.parametrize("bits", ALL_BITS)
def test_from_tokens_to_output(device: str, bits: int, head_dim: int) -> None:
    """Quantise, premult, attend, undo: attention over the tokens as they were decoded, in their own coordinates."""
    op = "flash_attn_vec_tq" if bits == 4 else "flash_attn_vec_tq_hb"
    stored = []
    for _ in range(2):
        packed, norms = empty_store(device, bits, 2, 64, head_dim)
        quantise(torch.randn(2, 60, head_dim, device=device), packed, norms, 0, bits, scale_factor_d512=math.sqrt(512))
        stored.append(Side(packed, norms, decoded(packed, norms, bits, math.sqrt(512)) @ rotation(head_dim).T))
    q = torch.randn(4, head_dim)
    rotated = attend(op, ops.fwht_sign_premult(q.to(device)), *stored, 60, bits, scale_factor_d512=math.sqrt(512))
    assert relative_error(ops.fwht_sign_undo(rotated), expected(q, *stored, 60)) <= float32_bound(60)


@each_kind
@pytest.mark.parametrize("mask_type", [0, 1, 2])
@pytest.mark.parametrize("sliding_window", [0, 1, 33, 70, 500])
def test_only_mask_type_two_looks_at_the_window(
    device: str, op: str, bits: int, mask_type: int, sliding_window: int
) -> None:
    k, v = sides(op, bits, device, 2, 80, 256)
    q = torch.randn(4, 256)
    options = {"mask_type": mask_type, "sliding_window": sliding_window}
    out = attend(op, q.to(device), k, v, 70, bits, **options)
    assert relative_error(out, expected(q, k, v, 70, **options)) <= float32_bound(70)


@each_kind
@every_head_dim
@pytest.mark.parametrize(("kv_seq_len", "ring_start"), [(50, 0), (50, 1), (50, 49), (37, 30), (13, 5)])
def test_position_order_does_not_depend_on_the_slots(
    device: str, op: str, bits: int, head_dim: int, kv_seq_len: int, ring_start: int
) -> None:
    k, v = sides(op, bits, device, 2, 50, head_dim)
    q = torch.randn(4, head_dim)
    options = {"mask_type": 2, "sliding_window": 20, "softcap": 5.0}
    straight = expected(q, k, v, kv_seq_len, **options)
    rolled = attend(
        op, q.to(device), k.rolled(ring_start), v.rolled(ring_start), kv_seq_len, bits, ring_start=ring_start, **options
    )
    assert relative_error(rolled, straight) <= float32_bound(kv_seq_len)


@pytest.mark.parametrize(("op", "bits"), ONE_OF_EACH[:2])  # no operator writes the hybrid's keys
def test_a_ring_filled_past_its_end(device: str, op: str, bits: int) -> None:
    """What quantising in sliding mode leaves, read with ring_start = write position % capacity."""
    tokens, capacity, head_dim = 41, 16, 256
    x = torch.randn(2, 2, tokens, head_dim, device=device)  # k and v
    ring, straight = [], []
    for side in x:
        packed, norms = empty_store(device, bits, 2, capacity, head_dim)
        for t in range(tokens):
            quantise(side[:, t], packed, norms, t, bits, is_sliding=True)
        ring.append(Side(packed, norms, decoded(packed, norms, bits)))
        packed, norms = empty_store(device, bits, 2, tokens, head_dim)
        quantise(side, packed, norms, 0, bits)
        straight.append(Side(packed, norms, decoded(packed, norms, bits)))
    q = torch.randn(4, head_dim)
    out = attend(op, q.to(device), *ring, capacity, bits, ring_start=tokens % capacity)
    seen = expected(q, *straight, tokens, mask_type=2, sliding_window=capacity)
    assert relative_error(out, seen) <= float32_bound(tokens)


@each_kind
@every_head_dim
def test_slots_that_hold_nothing_visible_are_not_looked_at(device: str, op: str, bits: int, head_dim: int) -> None:
    capacity, ring_start, kv_seq_len, window = 70, 65, 40, 9
    k, v = sides(op, bits, device, 2, capacity, head_dim)
    q = torch.randn(4, head_dim)
    options = {"mask_type": 2, "sliding_window": window, "ring_start": ring_start}
    exact = expected(q, k, v, kv_seq_len, **options)
    visible = [(ring_start + i) % capacity for i in range(kv_seq_len - window, kv_seq_len)]
    hidden = [slot for slot in range(capacity) if slot not in visible]
    for side in (k, v):
        if side.norms is None:
            side.packed[:, hidden] = math.nan
        else:
            side.norms[:, hidden] = math.nan
    out = attend(op, q.to(device), k, v, kv_seq_len, bits, **options)
    assert relative_error(out, exact) <= float32_bound(kv_seq_len)


@each_kind
@pytest.mark.parametrize("kv_seq_len", [5, 700])
def test_splitting_does_not_change_the_result(device: str, op: str, bits: int, kv_seq_len: int) -> None:
    k, v = sides(op, bits, device, 2, 700, 256)
    q = torch.randn(4, 256)
    exact = expected(q, k, v, kv_seq_len)
    for nwg in (0, 1, 2, 3, 7, 16, 31, 32):
        out = attend(op, q.to(device), k, v, kv_seq_len, bits, nwg=nwg)
        assert relative_error(out, exact) <= float32_bound(kv_seq_len)
    for nsg in () if op == "flash_attn_vec_tq" else (0, 1, 2, 4):
        out = attend(op, q.to(device), k, v, kv_seq_len, bits, nwg=3, nsg=nsg)
        assert relative_error(out, exact) <= float32_bound(kv_seq_len)


@each_kind
def test_logits_far_from_zero(device: str, op: str, bits: int) -> None:
    """Weights are taken relative to the largest logit: exp of these logits themselves leaves float32."""
    k, v = sides(op, bits, device, 1, 64, 256)
    k.dense[:, 17] *= 4  # the position that wins, in each of 64 / 3 parts or in one
    if k.norms is None:
        k.packed[:, 17] *= 4
    else:
        k.norms[:, 17] *= 4
    q = k.dense[0, 17].float()[None] * torch.tensor([[1.0], [-1.0]])
    out = attend(op, q.to(device), k, v, 64, bits, scale=1.0, nwg=3)
    exact = expected(q, k, v, 64, scale=1.0)
    assert out.isfinite().all()
    # The first query sees one position only; of the second's logits, thousands large, roundings of 1e-4 remain.
    assert relative_error(out[0], v.dense[0, 17]) <= float32_bound(64)
    assert relative_error(out[1], exact[1]) <= 64 * HALF_ULP * 1e4


@each_kind
def test_query_shapes_and_strides(device: str, op: str, bits: int) -> None:
    k, v = sides(op, bits, device, 2, 30, 256)
    q = torch.randn(256, 4, device=device).T
    plain = attend(op, q.contiguous(), k, v, 30, bits)
    assert relative_error(attend(op, q, k, v, 30, bits), plain) <= float32_bound(30)
    with_token = attend(op, q[:, None], k, v, 30, bits)
    assert with_token.shape == (4, 1, 256)
    assert relative_error(with_token[:, 0], plain) <= float32_bound(30)


@pytest.mark.parametrize(("op", "bits"), [*ONE_OF_EACH, ("flash_attn_vec_tq_hb_with_fused_undo", 5)])
def test_inputs_stay_and_outputs_are_fresh(device: str, op: str, bits: int) -> None:
    k, v = sides(op, bits, device, 2, 30, 256)
    q = torch.randn(4, 256, device=device)
    inputs = [x for x in (q, k.packed, k.norms, v.packed, v.norms) if x is not None]
    kept = [x.clone() for x in inputs]
    first = attend(op, q, k, v, 29, bits)
    result = first.clone()
    second = attend(op, -q, k, v, 29, bits)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
    assert torch.equal(first, result)
    assert len({x.data_ptr() for x in (first, second, *inputs)}) == 2 + len(inputs)


# Partial results


@pytest.mark.parametrize(("op", "bits"), [*ONE_OF_EACH, ("flash_attn_vec_tq_hb_with_fused_undo", 5)])
@every_head_dim
@pytest.mark.parametrize("nwg", [1, 3, 16, 32])
@pytest.mark.parametrize("kv_seq_len", [2, 200])
def test_partial_results_and_their_reduction(
    device: str, op: str, bits: int, head_dim: int, nwg: int, kv_seq_len: int
) -> None:
    heads = 4
    k, v = sides(op, bits, device, 2, 200, head_dim)
    q = torch.randn(heads, head_dim, device=device)
    needed = heads * nwg * (head_dim + 2)
    # Parts without positions must not depend on what was in the buffer before, nor the rest of the buffer change.
    tmp = torch.full((needed + 7,), math.nan, device=device)
    direct = attend(op, q, k, v, kv_seq_len, bits, nwg=nwg, tmp=tmp)
    assert relative_error(direct, attend(op, q, k, v, kv_seq_len, bits, nwg=nwg)) <= float32_bound(kv_seq_len)
    assert tmp[needed:].isnan().all()

    outs = tmp[: needed - 2 * heads * nwg].cpu().double().view(heads, nwg, head_dim)
    sums, largest = tmp[needed - 2 * heads * nwg : needed].cpu().double().view(heads, nwg, 2).unbind(-1)
    is_used = sums > 0
    shift = largest.masked_fill(~is_used, -math.inf).amax(1, keepdim=True)
    weights = torch.where(is_used, torch.exp(largest - shift), 0.0)
    merged = (weights[..., None] * outs.masked_fill(~is_used[..., None], 0.0)).sum(1)
    merged /= (weights * sums.masked_fill(~is_used, 0.0)).sum(1, keepdim=True)
    bound = float32_bound(kv_seq_len)
    rotated = expected(q.cpu(), k, v, kv_seq_len)
    assert relative_error(merged, rotated) <= bound
    # Every position is in one part: the sums, brought to one maximum, are the whole denominator.
    held = k.dense[:, :kv_seq_len].repeat_interleave(2, dim=0)
    total = torch.logsumexp(torch.einsum("hd,hld->hl", q.cpu().double(), held) * SCALE, dim=-1)
    denominator = shift[:, 0] + (weights * sums.masked_fill(~is_used, 0.0)).sum(1).log()
    torch.testing.assert_close(denominator, total, rtol=0, atol=bound * 10)

    kept = tmp.clone()
    reduced = ops.flash_attn_vec_reduce(tmp, heads, head_dim, nwg)
    undone = ops.flash_attn_vec_reduce_tq_hb_undo(tmp, heads, head_dim, nwg)
    assert relative_error(undone if "undo" in op else reduced, direct) <= bound
    assert relative_error(reduced, rotated) <= bound
    assert relative_error(undone, rotated @ rotation(head_dim).T) <= bound
    assert torch.equal(tmp.nan_to_num(), kept.nan_to_num())


@every_head_dim
@pytest.mark.parametrize("nwg", [1, 5, 32])
def test_reduction_of_any_partials(device: str, head_dim: int, nwg: int) -> None:
    rows = 3
    outs, sums = torch.randn(rows, nwg, head_dim), torch.rand(rows, nwg) + 0.5
    largest = 1000 + 3 * torch.randn(rows, nwg)  # exp of it leaves float32
    sums[1, 1:] = 0.0  # one part is in use
    sums[2] = 0.0  # none is
    outs[2] = 0.0
    outs[1, 1:] = math.nan
    weights = torch.where(sums > 0, torch.exp((largest - largest[:, :1]).double()), 0.0)
    exact = (weights[..., None] * outs.double().nan_to_num()).sum(1) / (weights * sums).sum(1, keepdim=True)
    exact[2] = 0.0
    tmp = torch.cat((outs.flatten(), torch.stack((sums, largest), dim=-1).flatten())).to(device)
    assert relative_error(ops.flash_attn_vec_reduce(tmp, rows, head_dim, nwg), exact) <= float32_bound(nwg)
    undone = ops.flash_attn_vec_reduce_tq_hb_undo(tmp, rows, head_dim, nwg)
    assert relative_error(undone, exact @ rotation(head_dim).T) <= float32_bound(nwg)
    assert ops.flash_attn_vec_reduce(tmp, 0, head_dim, nwg).shape == (0, head_dim)


# The general operator


@every_head_dim
@pytest.mark.parametrize(("ring_start", "window", "softcap"), [(0, 0, 0.0), (17, 0, 0.0), (30, 25, 4.0)])
def test_half_precision_stores_give_what_the_general_operator_gives(
    device: str, head_dim: int, ring_start: int, window: int, softcap: float
) -> None:
    capacity, kv_seq_len = 60, 50
    k, v = sides("flash_attn_vec_hybrid", 16, device, 2, capacity, head_dim)
    q = torch.randn(6, head_dim)
    given = q.to(device)
    options = {"mask_type": 2, "sliding_window": window, "softcap": softcap, "ring_start": ring_start}
    rotated = attend("flash_attn_vec_hybrid", ops.fwht_sign_premult(given), k, v, kv_seq_len, 8, nwg=1, **options)
    by_hand = ops.fwht_sign_undo(rotated)
    # Position p of the general operator is in slot p % capacity: the same slots hold positions ring_start and on.
    end = ring_start + kv_seq_len
    general, _ = ops.attend(
        given[None, :, None],
        *(k.packed[None], None, None, None),
        *(v.packed[None], None, None, None),
        *("f16", "f16"),
        start=ring_start,
        coded=end,
        length=end,
        scale=SCALE,
        softcap=softcap,
        window=window,
    )
    matrix = rotation(head_dim)
    exact = expected(q.double() @ matrix, k, v, kv_seq_len, **options) @ matrix.T
    assert relative_error(by_hand, exact) <= float32_bound(kv_seq_len)
    assert relative_error(general[0, :, 0], exact) <= float32_bound(kv_seq_len)


# Any call


@st.composite
def any_call(draw: st.DrawFn) -> dict[str, Any]:
    bits = draw(st.sampled_from(ALL_BITS))
    kv_seq_len = draw(st.integers(1, 300))
    capacity = kv_seq_len + draw(st.one_of(st.just(0), st.integers(0, 40)))
    op = "flash_attn_vec_tq"
    if bits != 4:
        op = draw(
            st.sampled_from(["flash_attn_vec_tq_hb", "flash_attn_vec_tq_hb_with_fused_undo", "flash_attn_vec_hybrid"])
        )
    return {
        "op": op,
        "bits": bits,
        "half_values": op == "flash_attn_vec_hybrid" and draw(st.booleans()),
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 5)),
        "kv_seq_len": kv_seq_len,
        "capacity": capacity,
        "scale_factor": draw(st.sampled_from([1.0, 16.0, math.sqrt(512)])),
        "fuse_fwht_pre": op != "flash_attn_vec_tq" and draw(st.booleans()),
        "nwg": draw(st.integers(0, 32)),
        "options": {
            "ring_start": draw(st.integers(0, capacity - 1)),
            "mask_type": draw(st.integers(0, 2)),
            "sliding_window": draw(st.integers(0, 320)),
            "softcap": draw(st.sampled_from([0.0, 2.0, 30.0])),
            "scale": draw(st.sampled_from([1.0, SCALE, 0.0, -0.05])),
        },
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(call=any_call())
def test_any_call(device: str, call: dict[str, Any]) -> None:
    torch.manual_seed(call["seed"])
    op, bits, head_dim, kv_seq_len = (call[name] for name in ("op", "bits", "head_dim", "kv_seq_len"))
    shape = (call["kv_heads"], call["capacity"], head_dim)
    k = random_side(device, 16 if op == "flash_attn_vec_hybrid" else bits, *shape, scale_factor=call["scale_factor"])
    v = random_side(device, 16 if call["half_values"] else bits, *shape, scale_factor=call["scale_factor"])
    # With the scale of 1, logits of this size: much larger ones amplify the rounding of q . k beyond the bound.
    q = torch.randn(call["kv_heads"] * call["group"], head_dim) / 16
    options = {**call["options"], "nwg": call["nwg"], "scale_factor_d512": call["scale_factor"]}
    if op != "flash_attn_vec_tq":
        options["fuse_fwht_pre"] = call["fuse_fwht_pre"]
    out = attend(op, q.to(device), k, v, kv_seq_len, bits, **options)
    matrix = rotation(head_dim)
    rotated = q.double() @ matrix if call["fuse_fwht_pre"] else q
    exact = expected(rotated, k, v, kv_seq_len, **call["options"])
    if op == "flash_attn_vec_tq_hb_with_fused_undo":
        exact = exact @ matrix.T
    assert relative_error(out, exact) <= float32_bound(kv_seq_len)


def opcheck_cases() -> list[tuple[str, tuple[Any, ...]]]:
    q, x = torch.randn(4, 256), torch.randn(2, 3, 256)
    nibbles, codes = (torch.zeros(2, 20, width, dtype=torch.uint8) for width in (128, 256))
    norms, half, tmp = torch.rand(2, 20), torch.randn(2, 20, 256).half(), torch.zeros(4 * 16 * 258)
    masked = (10, 0.1, 2, 5, 0.0, 3, 1.0, 16, tmp)
    return [
        ("fwht_sign_premult", (q,)),
        ("fwht_sign_undo", (q,)),
        ("hadamard_quantize_kv", (x, nibbles, norms, 3)),
        ("hadamard_quantize_kv_hb", (x, codes, norms, 3, 6)),
        ("flash_attn_vec_tq", (q, nibbles, norms, nibbles, norms, *masked)),
        ("flash_attn_vec_tq_hb", (q, codes, norms, codes, norms, 10, 0.1, 8)),
        ("flash_attn_vec_tq_hb_with_fused_undo", (q, codes, norms, codes, norms, 10, 0.1, 5)),
        ("flash_attn_vec_hybrid", (q, half, codes, norms, 10, 0.1, 6)),
        ("flash_attn_vec_hybrid", (q, half, half, None, 10, 0.1, 8)),
        ("flash_attn_vec_reduce", (tmp, 4, 256, 16)),
        ("flash_attn_vec_reduce_tq_hb_undo", (tmp, 4, 256, 16)),
    ]


@pytest.mark.parametrize(("name", "arguments"), opcheck_cases(), ids=lambda case: case if isinstance(case, str) else "")
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.tqattn, name).default, arguments)
