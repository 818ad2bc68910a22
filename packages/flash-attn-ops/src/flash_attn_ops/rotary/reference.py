"""Rotary embedding in plain torch operations: the definition, and what runs where the kernel does not."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with its first R dimensions turned by the angles of cos and sin (..., R/2)."""
    rotary_dim = 2 * cos.shape[-1]
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(compute_dtype).unsqueeze(-2) for table in (cos, sin))
    rotated, rest = x[..., :rotary_dim].to(compute_dtype), x[..., rotary_dim:]
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    turned = [(first * cos - second * sin).to(x.dtype), (first * sin + second * cos).to(x.dtype)]
    if interleaved:
        turned = [torch.stack(turned, dim=-1).flatten(-2)]
    return torch.cat([*turned, rest], dim=-1)


def rows_of_tokens(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for the tokens of x: NaN beyond the table, the identity outside every
    sequence."""
    inside: Tensor | None = None
    if position_ids is not None:
        position = position_ids
    elif cu_seqlens is None:
        seqlen = x.shape[1]
        if isinstance(seqlen_offsets, int):
            return cos[seqlen_offsets : seqlen_offsets + seqlen], sin[
                seqlen_offsets : seqlen_offsets + seqlen
            ]
        position = torch.arange(seqlen, device=x.device) + seqlen_offsets[:, None]
    else:
        token = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
        inside = (sequence >= 0) & (sequence < len(cu_seqlens) - 1)
        sequence = sequence.clamp(0, len(cu_seqlens) - 2)
        offset = seqlen_offsets if isinstance(seqlen_offsets, int) else seqlen_offsets[sequence]
        position = token - cu_seqlens[sequence] + offset
    known = (position >= 0) & (position < len(cos))
    row = position.clamp(0, max(len(cos) - 1, 0)).long()

    def rows(table: Tensor, identity: float) -> Tensor:
        found = torch.where(known[..., None], table[row], torch.nan)
        return found if inside is None else torch.where(inside[..., None], found, identity)

    return rows(cos, 1.0), rows(sin, 0.0)
