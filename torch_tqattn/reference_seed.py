"""The seed-shaped operators in plain float32 PyTorch: one sequence, head dims 256 and 512, unrounded codebooks."""

from typing import Any

import torch
from torch import Tensor

from . import format as fmt
from . import reference


def _seed_codebook(codebook_bits: int) -> tuple[fmt.Format, Tensor]:
    name = "tq4" if codebook_bits == 4 else "tq8"
    return fmt.FORMATS[name], fmt.exact_levels(codebook_bits)


def _seed_norm_factor(head_dim: int, scale_factor_d512: float) -> float:
    """What a stored norm is multiplied with: 256 stores lengths, 512 root mean squares times the scale factor."""
    if head_dim == 256:
        return head_dim**-0.5
    return 1.0 / (scale_factor_d512 if scale_factor_d512 >= 1e-6 else 1.0)


def _seed_quantise_(
    x: Tensor, packed: Tensor, norms: Tensor, write_pos: int, is_sliding: bool, scale_factor: float, bits: int
) -> None:
    storage, codebook = _seed_codebook(bits)
    rows = x if x.dim() == 3 else x[:, None]
    capacity = packed.shape[1]
    kept = rows[:, -capacity:]
    begin = write_pos + rows.shape[1] - kept.shape[1]
    slots = torch.arange(begin, begin + kept.shape[1], device=x.device)
    slots = slots % capacity if is_sliding else slots
    codes, rms = reference.quantise(reference.rotate(kept), codebook, encode="plain")
    packed[:, slots] = fmt.pack(codes, storage)
    reference.split_norms(norms, x.shape[-1])[:, slots] = rms / _seed_norm_factor(x.shape[-1], scale_factor)


def hadamard_quantize_kv(
    x: Tensor,
    packed: Tensor,
    norms: Tensor,
    write_pos: int,
    is_sliding: bool = False,
    scale_factor_d512: float = 1.0,
) -> None:
    _seed_quantise_(x, packed, norms, write_pos, is_sliding, scale_factor_d512, 4)


def hadamard_quantize_kv_hb(
    x: Tensor,
    packed: Tensor,
    norms: Tensor,
    write_pos: int,
    codebook_bits: int,
    is_sliding: bool = False,
    scale_factor_d512: float = 1.0,
) -> None:
    _seed_quantise_(x, packed, norms, write_pos, is_sliding, scale_factor_d512, codebook_bits)


def _seed_rows(
    store: Tensor, norms: Tensor | None, bits: int, head_dim: int, scale_factor: float, slots: Tensor
) -> Tensor:
    if store.dtype == torch.float16:
        return store[:, slots].float()
    assert norms is not None
    storage, codebook = _seed_codebook(bits)
    scaled = reference.split_norms(norms, head_dim)[:, slots] * _seed_norm_factor(head_dim, scale_factor)
    return reference.dequantise(fmt.unpack(store[:, slots], storage, head_dim), scaled, codebook)


def _seed_attention(
    q: Tensor,
    stores: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    bits: int,
    kv_seq_len: int,
    scale: float,
    mask: tuple[int, int, float, int, float],
    fuse_fwht_pre: bool,
    nwg: int,
    tmp: Tensor | None,
) -> Tensor:
    """Attention in the rotated domain, split over nwg contiguous parts whose partial results are merged."""
    k_store, k_norms, v_store, v_norms = stores
    mask_type, sliding_window, softcap, ring_start, scale_factor_d512 = mask
    head_dim = q.shape[-1]
    query = reference.rotate(q) if fuse_fwht_pre else q
    query = query.reshape(-1, 1, head_dim)
    first = max(0, kv_seq_len - sliding_window) if mask_type == 2 and sliding_window > 0 else 0
    parts = -(-(kv_seq_len - first) // nwg)
    partial_out = q.new_zeros(query.shape[0], nwg, head_dim)
    sums = q.new_zeros(query.shape[0], nwg, 2)
    sums[..., 1] = -torch.inf
    for part in range(nwg):
        begin, end = first + part * parts, min(first + (part + 1) * parts, kv_seq_len)
        if begin >= end:
            continue
        slots = (torch.arange(begin, end, device=q.device) + ring_start) % k_store.shape[1]
        k = _seed_rows(k_store, k_norms, bits, head_dim, scale_factor_d512, slots)
        v = _seed_rows(v_store, v_norms, bits, head_dim, scale_factor_d512, slots)
        visible = torch.ones(1, 1, end - begin, dtype=torch.bool, device=q.device)
        out, lse = reference.softmax_attention(query[None], k[None], v[None], visible, scale, softcap, None)
        partial_out[:, part] = out[0, :, 0]
        sums[:, part, 0] = 1.0
        sums[:, part, 1] = lse[0, :, 0]
    if tmp is not None:
        rows = query.shape[0] * nwg
        tmp.view(-1)[: rows * head_dim] = partial_out.flatten()
        tmp.view(-1)[rows * head_dim : rows * (head_dim + 2)] = sums.flatten()
    return _merge(partial_out, sums).reshape(q.shape)


def _merge(partial_out: Tensor, sums: Tensor) -> Tensor:
    """Partial outputs [rows, nwg, D], each with its sum and maximum [rows, nwg, 2], as one output [rows, D]."""
    weight = torch.exp(sums[..., 1] - sums[..., 1].amax(-1, keepdim=True))
    weight = torch.where(sums[..., 0] > 0, weight, 0.0)
    total = (weight * sums[..., 0]).sum(-1, keepdim=True)
    used = torch.where(sums[..., :1] > 0, partial_out, 0.0)  # an unused part may hold anything
    return (weight[..., None] * used).sum(1) / torch.where(total > 0, total, 1.0)


def _split_tmp(tmp: Tensor, nrows: int, head_dim: int, nwg: int) -> tuple[Tensor, Tensor]:
    flat = tmp.reshape(-1)
    boundary = nrows * nwg * head_dim
    return (
        flat[:boundary].view(nrows, nwg, head_dim),
        flat[boundary : boundary + nrows * nwg * 2].view(nrows, nwg, 2),
    )


def flash_attn_vec_reduce(tmp: Tensor, nrows: int, head_dim: int, nwg: int) -> Tensor:
    return _merge(*_split_tmp(tmp, nrows, head_dim, nwg))


def flash_attn_vec_reduce_tq_hb_undo(tmp: Tensor, nrows: int, head_dim: int, nwg: int) -> Tensor:
    return reference.rotate(flash_attn_vec_reduce(tmp, nrows, head_dim, nwg), inverse=True)


def _nwg(kind: str, kv_seq_len: int, nwg: int) -> int:
    return nwg or torch.ops.tqattn.launch_policy(kind, kv_seq_len)[0]


def flash_attn_vec_tq(
    q: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    kv_seq_len: int,
    scale: float,
    mask_type: int = 0,
    sliding_window: int = 0,
    softcap: float = 0.0,
    ring_start: int = 0,
    scale_factor_d512: float = 1.0,
    nwg: int = 0,
    tmp: Tensor | None = None,
) -> Tensor:
    stores = (k_packed, k_norms, v_packed, v_norms)
    mask = (mask_type, sliding_window, softcap, ring_start, scale_factor_d512)
    return _seed_attention(q, stores, 4, kv_seq_len, scale, mask, False, _nwg("tq", kv_seq_len, nwg), tmp)


def flash_attn_vec_hybrid(
    q: Tensor,
    k_f16: Tensor,
    v_packed: Tensor,
    v_norms: Tensor | None,
    kv_seq_len: int,
    scale: float,
    codebook_bits: int,
    mask_type: int = 0,
    sliding_window: int = 0,
    softcap: float = 0.0,
    ring_start: int = 0,
    scale_factor_d512: float = 1.0,
    fuse_fwht_pre: bool = False,
    nwg: int = 0,
    nsg: int = 0,
    tmp: Tensor | None = None,
) -> Tensor:
    stores = (k_f16, None, v_packed, v_norms)
    mask = (mask_type, sliding_window, softcap, ring_start, scale_factor_d512)
    parts = _nwg("hybrid", kv_seq_len, nwg)
    return _seed_attention(q, stores, codebook_bits, kv_seq_len, scale, mask, fuse_fwht_pre, parts, tmp)


def flash_attn_vec_tq_hb(
    q: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    kv_seq_len: int,
    scale: float,
    codebook_bits: int,
    mask_type: int = 0,
    sliding_window: int = 0,
    softcap: float = 0.0,
    ring_start: int = 0,
    scale_factor_d512: float = 1.0,
    fuse_fwht_pre: bool = False,
    nwg: int = 0,
    nsg: int = 0,
    tmp: Tensor | None = None,
) -> Tensor:
    stores = (k_packed, k_norms, v_packed, v_norms)
    mask = (mask_type, sliding_window, softcap, ring_start, scale_factor_d512)
    parts = _nwg("tq_hb", kv_seq_len, nwg)
    return _seed_attention(q, stores, codebook_bits, kv_seq_len, scale, mask, fuse_fwht_pre, parts, tmp)


def flash_attn_vec_tq_hb_with_fused_undo(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return reference.rotate(flash_attn_vec_tq_hb(q, *args, **kwargs), inverse=True)


def fwht_sign_premult(x: Tensor) -> Tensor:
    return reference.rotate(x)


def fwht_sign_undo(x: Tensor) -> Tensor:
    return reference.rotate(x, inverse=True)
