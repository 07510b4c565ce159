"""The general operators in plain float32 PyTorch: an oracle for tests, and what runs on a device without kernels.

Signatures are the operators' own (csrc/schema.cpp). Arguments have been checked before a function here is called.
Positions are absolute: position p of a ring of C slots lives in slot p % C, so a ring never moves a row.
"""

import torch
from torch import Tensor

from . import format as fmt

Rows = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # codes, norms, means, tail


def _hadamard(x: Tensor) -> Tensor:
    """Hadamard transform of the last dimension, not normalised, by sums and differences.

    Not a matrix product: that rounds differently with the shape of the batch, and the same token must always get the
    same codes.
    """
    head_dim = x.shape[-1]
    odd = fmt.odd_order(head_dim)
    if odd > 1:
        signs = fmt.hadamard_odd_order(odd).float().to(x.device)
        x = (x.unflatten(-1, (1, odd, -1)) * signs[:, :, None]).sum(-2).flatten(-2)
    width = head_dim // odd
    while width > 1:
        width //= 2
        first, second = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return x


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    head_dim = x.shape[-1]
    signs = fmt.signs(head_dim).to(x.device)
    rotated = _hadamard(x.float() if inverse else x.float() * signs) / head_dim**0.5
    return rotated * signs if inverse else rotated


def to_half(y: Tensor) -> Tensor:
    """float32 to float16; finite numbers stay finite."""
    return torch.where(y.isinf(), y, y.clamp(-fmt.HALF_MAX, fmt.HALF_MAX)).half()


def _groups(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (-1, min(rows.shape[-1], fmt.NORM_GROUP)))


def _root_mean_square(groups: Tensor) -> Tensor:
    """Over the last dimension. Scaled by the largest number, so that neither huge nor tiny ones leave float32."""
    peak = groups.abs().amax(-1, keepdim=True)
    unit = torch.where(peak > 0, peak, 1.0)
    return (unit * (groups / unit).square().mean(-1, keepdim=True).sqrt()).squeeze(-1)


def quantise(rows: Tensor, codebook: Tensor, preserve_norm: bool) -> tuple[Tensor, Tensor]:
    """Nearest level of every coordinate, and the number that each group's levels are multiplied with.

    Args:
        rows: float32 [..., D], rotated.
        codebook: float32 [levels], ascending.
        preserve_norm: make the decoded group as long as the original; else its root mean square is the scale.

    Returns:
        uint8 codes [..., D] and float32 norms [..., groups]; the norm of a group with a NaN or an infinity is NaN.
    """
    groups = _groups(rows)
    rms = _root_mean_square(groups)
    safe = torch.where(rms > 0, rms, 1.0)[..., None]
    normalised = (groups / safe).nan_to_num(0.0)
    codes = torch.bucketize(normalised, fmt.thresholds(codebook).to(rows.device))
    norms = rms
    if preserve_norm:
        norms = rms / codebook.to(rows.device)[codes].square().mean(-1).sqrt()
    norms = torch.where(rms > 0, norms, rms)
    norms = torch.where(norms.isfinite(), norms, torch.nan)
    return codes.flatten(-2).to(torch.uint8), norms


def dequantise(codes: Tensor, norms: Tensor, codebook: Tensor) -> Tensor:
    """float32 [..., D]: levels times their group's norm. Of a code, only as many bits as the codebook has count."""
    values = codebook.to(codes.device)[codes.int() & (len(codebook) - 1)]
    return (_groups(values) * norms[..., None]).flatten(-2)


def split_norms(norms: Tensor, head_dim: int) -> Tensor:
    """Stored norms [..., slots] or [..., slots, groups] as [..., slots, groups]."""
    return norms if head_dim > fmt.NORM_GROUP else norms[..., None]


def _positions(begin: int, end: int, device: torch.device) -> Tensor:
    return torch.arange(begin, end, device=device)


# Encoding


def _store_rows(
    side: Rows, storage: fmt.Format, rows: Tensor, begin: int, block_size: int, valid: Tensor, encode: str
) -> None:
    """Code rotated rows [B, H, T, D] of positions begin... into their slots; rows that are not valid become zero."""
    codes, norms, means, _ = side
    slots = _positions(begin, begin + rows.shape[2], rows.device) % codes.shape[2]
    if means is not None:
        blocks = rows.unflatten(2, (-1, block_size))
        counted = valid[:, None, :, None] & rows.isfinite().all(-1, keepdim=True)
        counted = counted.unflatten(2, (-1, block_size))
        total = torch.where(counted, blocks, 0.0).sum(3)
        mean = to_half(total / counted.sum(3).clamp(min=1))
        means[:, :, slots[::block_size] // block_size] = mean
        rows = (blocks - mean.float()[:, :, :, None]).flatten(2, 3)
    rows = torch.where(valid[:, None, :, None], rows, 0.0)
    if not storage.is_coded:
        codes[:, :, slots] = to_half(rows)
        return
    assert norms is not None
    indices, scale = quantise(rows, fmt.levels(storage.bits), preserve_norm=encode != "plain")
    codes[:, :, slots] = fmt.pack(indices, storage)
    split_norms(norms, rows.shape[-1])[:, :, slots] = scale


def _encode_side(
    x: Tensor,
    side: Rows,
    format_name: str,
    position: int,
    coded: int,
    coded_end: int,
    block_size: int,
    starts: Tensor | None,
    encode: str,
) -> None:
    tail = side[3]
    storage = fmt.get_format(format_name)
    end = position + x.shape[2]
    slot_count = side[0].shape[2]
    rows = rotate(x)
    if tail is not None:
        rows = to_half(rows)
        old = _positions(coded, position, x.device) % tail.shape[2]
        rows = torch.cat([tail[:, :, old], rows], dim=2)
    first = max(coded, coded_end - slot_count)  # older rows would be overwritten by this very call
    positions = _positions(coded, end, x.device)
    valid = positions[None] >= (
        torch.zeros(x.shape[0], 1, device=x.device) if starts is None else starts[:, None].to(x.device)
    )
    if coded_end > first:
        kept = slice(first - coded, coded_end - coded)
        _store_rows(side, storage, rows[:, :, kept].float(), first, block_size, valid[:, kept], encode)
    if tail is not None:
        fresh = max(coded_end, position)
        slots = _positions(fresh, end, x.device) % tail.shape[2]
        waiting = slice(fresh - coded, end - coded)
        tail[:, :, slots] = torch.where(valid[:, None, waiting, None], rows[:, :, waiting], 0.0).half()


def encode_kv_(
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_norms: Tensor | None,
    k_means: Tensor | None,
    k_tail: Tensor | None,
    v_codes: Tensor,
    v_norms: Tensor | None,
    v_means: Tensor | None,
    v_tail: Tensor | None,
    k_format: str,
    v_format: str,
    position: int,
    coded: int,
    coded_end: int,
    block_size: int = 0,
    starts: Tensor | None = None,
    encode: str = "fast",
) -> None:
    for x, side, name in (
        (k, (k_codes, k_norms, k_means, k_tail), k_format),
        (v, (v_codes, v_norms, v_means, v_tail), v_format),
    ):
        _encode_side(x, side, name, position, coded, coded_end, block_size, starts, encode)


# Decoding


def _decode_side(
    side: Rows, format_name: str, head_dim: int, start: int, coded: int, length: int, block_size: int
) -> Tensor:
    """Rotated rows [B, H, length - start, D] of positions start..length, float32."""
    codes, norms, means, tail = side
    parts = []
    if coded > start:
        slots = _positions(start, coded, codes.device) % codes.shape[2]
        storage = fmt.get_format(format_name)
        if storage.is_coded:
            assert norms is not None
            indices = fmt.unpack(codes[:, :, slots], storage, head_dim)
            rows = dequantise(indices, split_norms(norms, head_dim)[:, :, slots], fmt.levels(storage.bits))
        else:
            rows = codes[:, :, slots].float()
        if means is not None:
            rows = rows + means[:, :, slots // block_size].float()
        parts.append(rows)
    if tail is not None:
        begin = max(start, coded)
        parts.append(tail[:, :, _positions(begin, length, codes.device) % tail.shape[2]].float())
    empty = torch.zeros(*codes.shape[:2], 0, head_dim, device=codes.device)
    return torch.cat([empty, *parts], dim=2)


def decode_kv(
    k_codes: Tensor,
    k_norms: Tensor | None,
    k_means: Tensor | None,
    k_tail: Tensor | None,
    v_codes: Tensor,
    v_norms: Tensor | None,
    v_means: Tensor | None,
    v_tail: Tensor | None,
    k_format: str,
    v_format: str,
    head_dim: int,
    start: int,
    coded: int,
    length: int,
    block_size: int = 0,
    starts: Tensor | None = None,
    rotated: bool = False,
) -> tuple[Tensor, Tensor]:
    decoded = []
    for side, name in (
        ((k_codes, k_norms, k_means, k_tail), k_format),
        ((v_codes, v_norms, v_means, v_tail), v_format),
    ):
        rows = _decode_side(side, name, head_dim, start, coded, length, block_size)
        if starts is not None:
            padding = _positions(start, length, rows.device)[None] < starts[:, None]
            rows = torch.where(padding[:, None, :, None], 0.0, rows)
        decoded.append(rows if rotated else rotate(rows, inverse=True))
    return decoded[0], decoded[1]


# Attention


def _visible(
    q_len: int,
    start: int,
    length: int,
    causal: bool,
    window: int,
    mask: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which positions start..length each query sees: bool [B or 1, q_len, length - start]."""
    ends = torch.tensor([length], device=device) if lengths is None else lengths.to(device).long()
    begins = torch.zeros_like(ends) if starts is None else starts.to(device).long()
    position = _positions(start, length, device)[None, None]
    query = (ends[:, None] - q_len + torch.arange(q_len, device=device))[:, :, None]
    seen = (position < ends[:, None, None]) & (position >= begins[:, None, None])
    seen = seen.expand(-1, q_len, -1)
    if causal:
        seen = seen & (position <= query)
    if window:
        seen = seen & (position > query - window)
    return seen if mask is None else seen & mask.to(device)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, L, D], all float32; visible bool [B or 1, T, L].

    Returns out [B, Hq, T, D] and the log-sum-exp of the logits (sink included) [B, Hq, T]. A query that sees nothing
    gets zeros, and the logarithm of its sink (-inf without one).
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    lse = logits.logsumexp(-1) if logits.shape[-1] else torch.full(logits.shape[:3], -torch.inf, device=q.device)
    weights = torch.exp(logits - torch.where(lse.isneginf(), 0.0, lse)[..., None])[..., : k.shape[2]]
    hidden = ~visible.any(1)[:, None, :, None]  # 0 * NaN is NaN: a row that nobody sees must not count
    return weights @ torch.where(hidden, 0.0, v), lse


def attend(
    q: Tensor,
    k_codes: Tensor,
    k_norms: Tensor | None,
    k_means: Tensor | None,
    k_tail: Tensor | None,
    v_codes: Tensor,
    v_norms: Tensor | None,
    v_means: Tensor | None,
    v_tail: Tensor | None,
    k_format: str,
    v_format: str,
    start: int,
    coded: int,
    length: int,
    block_size: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    k = _decode_side((k_codes, k_norms, k_means, k_tail), k_format, head_dim, start, coded, length, block_size)
    v = _decode_side((v_codes, v_norms, v_means, v_tail), v_format, head_dim, start, coded, length, block_size)
    visible = _visible(q.shape[2], start, length, causal, window, mask, starts, lengths, q.device)
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = softmax_attention(rotate(q), k, v, visible, scale, softcap, sinks)
    return rotate(out, inverse=True).to(q.dtype), lse


def decode_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_norms: Tensor | None,
    k_means: Tensor | None,
    k_tail: Tensor | None,
    v_codes: Tensor,
    v_norms: Tensor | None,
    v_means: Tensor | None,
    v_tail: Tensor | None,
    k_format: str,
    v_format: str,
    start: int,
    position: int,
    coded: int,
    coded_end: int,
    block_size: int = 0,
    encode: str = "fast",
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    stores = (k_codes, k_norms, k_means, k_tail, v_codes, v_norms, v_means, v_tail, k_format, v_format)
    encode_kv_(k, v, *stores, position, coded, coded_end, block_size, starts, encode)
    length = position + k.shape[2]
    return attend(q, *stores, start, coded_end, length, block_size, scale, softcap, window, sinks, mask, starts)
