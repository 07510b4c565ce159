"""The general operators in plain float32 PyTorch: an oracle for tests, and what runs on a device without kernels.

Signatures are the operators' own (csrc/schema.cpp). Arguments have been checked before a function here is called.
Positions are absolute: position p of a ring of C slots lives in slot p % C, so a ring never moves a row. The tail holds
first `sink_length` rows with each sequence's first tokens, then a ring.
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


def _best_codes(normalised: Tensor, codebook: Tensor) -> Tensor:
    """For each group, of the codes that fmt.SCALE_MULTIPLIERS give, those that make the smallest angle with it."""
    codes = torch.zeros_like(normalised, dtype=torch.int64)
    least = torch.full_like(normalised[..., :1], torch.inf)
    for multiplier in fmt.SCALE_MULTIPLIERS:
        tried = torch.bucketize(normalised, fmt.thresholds(codebook) * multiplier)
        level = codebook[tried]
        # The squared length of the group's part at right angles to its codes: that of what quantising at this scale
        # left over, less what another scale would still take off it. From the group itself, float32 would lose the
        # difference at 8 bits.
        rest = normalised - level * multiplier
        along = (rest * level).sum(-1, keepdim=True)
        error = rest.square().sum(-1, keepdim=True) - along * along / level.square().sum(-1, keepdim=True)
        codes = torch.where(error < least, tried, codes)
        least = torch.minimum(error, least)
    return codes


def quantise(rows: Tensor, codebook: Tensor, encode: str) -> tuple[Tensor, Tensor]:
    """Nearest level of every coordinate, and the number that each group's levels are multiplied with.

    Args:
        rows: float32 [..., D], rotated.
        codebook: float32 [levels], ascending.
        encode: "fast" makes the decoded group as long as the original; "best" too, with the codes, of those that
            fmt.SCALE_MULTIPLIERS give, that make the smallest angle with it; "plain" has its root mean square as norm.

    Returns:
        uint8 codes [..., D] and float32 norms [..., groups]; the norm of a group with a NaN or an infinity is NaN.
    """
    groups = _groups(rows)
    rms = _root_mean_square(groups)
    safe = torch.where(rms > 0, rms, 1.0)[..., None]
    normalised = (groups / safe).nan_to_num(0.0)
    codebook = codebook.to(rows.device)
    if encode == "best":
        codes = _best_codes(normalised, codebook)
    else:
        codes = torch.bucketize(normalised, fmt.thresholds(codebook))
    norms = rms
    if encode != "plain":
        norms = rms / codebook[codes].square().mean(-1).sqrt()
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
    """Code rotated rows [B, H, T, D] of positions begin... into their slots; rows that are not valid become zeros."""
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
    indices, scale = quantise(rows, fmt.levels(storage.bits), encode)
    codes[:, :, slots] = fmt.pack(indices, storage)
    split_norms(norms, rows.shape[-1])[:, :, slots] = scale


def _begins(starts: Tensor | None, like: Tensor) -> Tensor:
    """The first position of each sequence that is no padding, int64 [B, 1]."""
    if starts is None:
        return torch.zeros(like.shape[0], 1, dtype=torch.int64, device=like.device)
    return starts[:, None].to(like.device).long().clamp(min=0)


def _waiting_slots(tail: Tensor, begin: int, end: int, sink_length: int) -> Tensor:
    """Rows of the tail's ring where positions begin..end wait."""
    return sink_length + _positions(begin, end, tail.device) % max(tail.shape[2] - sink_length, 1)


def _store_sinks(tail: Tensor, rows: Tensor, position: int, sink_length: int, begins: Tensor) -> None:
    """Put those rotated rows [B, H, T, D] of positions position... that are sinks into their rows of the tail."""
    if not rows.shape[2]:
        return
    index = begins + _positions(0, sink_length, rows.device) - position  # [B, sink_length], into rows
    given = (index >= 0) & (index < rows.shape[2])
    index = index.clamp(0, rows.shape[2] - 1)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    sinks = tail[:, :, :sink_length]
    sinks.copy_(torch.where(given[:, None, :, None], to_half(rows.gather(2, index)), sinks))


def _read_sinks(rows: Tensor, tail: Tensor, start: int, sink_length: int, begins: Tensor) -> Tensor:
    """Rows [B, H, L, D] of positions start..., with the sinks among them from their rows of the tail."""
    index = start + _positions(0, rows.shape[2], rows.device) - begins  # [B, L], into the tail
    is_sink = (index >= 0) & (index < sink_length)
    index = index.clamp(0, sink_length - 1)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return torch.where(is_sink[:, None, :, None], tail.gather(2, index).float(), rows)


def _encode_side(
    x: Tensor,
    side: Rows,
    format_name: str,
    position: int,
    coded: int,
    coded_end: int,
    block_size: int,
    sink_length: int,
    starts: Tensor | None,
    encode: str,
) -> None:
    tail = side[3]
    storage = fmt.get_format(format_name)
    end = position + x.shape[2]
    slot_count = side[0].shape[2]
    rows = rotate(x)
    begins = _begins(starts, x)
    if tail is not None and sink_length:
        _store_sinks(tail, rows, position, sink_length, begins)
    if tail is not None and block_size:
        rows = to_half(rows)
        old = _waiting_slots(tail, coded, position, sink_length)
        rows = torch.cat([tail[:, :, old], rows], dim=2)
    first = max(coded, coded_end - slot_count)  # older rows would be overwritten by this very call
    valid = _positions(coded, end, x.device)[None] >= begins + sink_length
    if coded_end > first:
        kept = slice(first - coded, coded_end - coded)
        _store_rows(side, storage, rows[:, :, kept].float(), first, block_size, valid[:, kept], encode)
    if tail is not None and block_size:
        fresh = max(coded_end, position)
        slots = _waiting_slots(tail, fresh, end, sink_length)
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
    sink_length: int = 0,
    starts: Tensor | None = None,
    encode: str = "fast",
) -> None:
    for x, side, name in (
        (k, (k_codes, k_norms, k_means, k_tail), k_format),
        (v, (v_codes, v_norms, v_means, v_tail), v_format),
    ):
        _encode_side(x, side, name, position, coded, coded_end, block_size, sink_length, starts, encode)


# Decoding


def _decode_side(
    side: Rows,
    format_name: str,
    head_dim: int,
    start: int,
    coded: int,
    length: int,
    block_size: int,
    sink_length: int,
    starts: Tensor | None,
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
    if tail is not None and block_size:
        parts.append(tail[:, :, _waiting_slots(tail, max(start, coded), length, sink_length)].float())
    empty = torch.zeros(*codes.shape[:2], 0, head_dim, device=codes.device)
    rows = torch.cat([empty, *parts], dim=2)
    if tail is not None and sink_length:
        rows = _read_sinks(rows, tail, start, sink_length, _begins(starts, rows))
    return rows


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
    sink_length: int = 0,
    starts: Tensor | None = None,
    rotated: bool = False,
) -> tuple[Tensor, Tensor]:
    decoded = []
    for side, name in (
        ((k_codes, k_norms, k_means, k_tail), k_format),
        ((v_codes, v_norms, v_means, v_tail), v_format),
    ):
        rows = _decode_side(side, name, head_dim, start, coded, length, block_size, sink_length, starts)
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
    lse = lse.masked_fill(lse.isposinf(), torch.nan)  # infinity less itself, as in a softmax
    weights = torch.exp(logits - torch.where(lse.isneginf(), 0.0, lse)[..., None])[..., : k.shape[2]]
    # 0 * NaN is NaN, and infinity likewise: such rows count for the queries that see them, and for no others.
    finite = v.isfinite().all(-1, keepdim=True)
    out = weights @ torch.where(finite, v, 0.0)
    for j in (~finite).any(1).any(0).flatten().nonzero().flatten().tolist():
        row = torch.where(finite[:, :, j], 0.0, v[:, :, j])[:, :, None]
        out = out + torch.where(visible[:, None, :, j, None], weights[..., j, None] * row, 0.0)
    return out, lse


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
    sink_length: int = 0,
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
    held = (head_dim, start, coded, length, block_size, sink_length, starts)
    k = _decode_side((k_codes, k_norms, k_means, k_tail), k_format, *held)
    v = _decode_side((v_codes, v_norms, v_means, v_tail), v_format, *held)
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
    sink_length: int = 0,
    encode: str = "fast",
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    stores = (k_codes, k_norms, k_means, k_tail, v_codes, v_norms, v_means, v_tail, k_format, v_format)
    encode_kv_(k, v, *stores, position, coded, coded_end, block_size, sink_length, starts, encode)
    length = position + k.shape[2]
    held = (start, coded_end, length, block_size, sink_length)
    return attend(q, *stores, *held, scale, softcap, window, sinks, mask, starts)
