"""The definition of attention that every path is tested against: short, quadratic, in any precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import AttentionOptions


class ReferenceAttention(NamedTuple):
    """Result of :func:`attention_reference`."""

    out: Tensor
    lse: Tensor
    probabilities: Tensor


def visibility(options: AttentionOptions, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """bool (Sq, Sk): which key each query can see."""
    distance = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_q, device=device).unsqueeze(-1)
    distance = distance - (seqlen_k - seqlen_q)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.window_left is not None:
        visible &= distance >= -options.window_left
    if options.window_right is not None:
        visible &= distance <= options.window_right
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    alibi_slopes: Tensor | None = None,
    keep_mask: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> ReferenceAttention:
    r"""Attention as textbooks write it, differentiable by autograd.

    .. math::
        s_{ij} = \mathrm{cap}(c\, q_i \cdot k_j) - \mathrm{slope}\,|i + S_k - S_q - j|, \qquad
        o_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}}\, v_j

    over the visible keys, with ``cap(x) = softcap * tanh(x / softcap)``.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv); query head h reads kv head ``h // (H / Hk)``.
        options: scale, window, softcap, dropout probability.
        alibi_slopes: (H,) or (B, H).
        keep_mask: bool (B, H, Sq, Sk), required when ``options.dropout_p > 0``.
        compute_dtype: precision of every step; the output comes back in the dtype of q.

    Returns:
        out (B, Sq, H, Dv), lse (B, H, Sq) natural log, undropped probabilities (B, H, Sq, Sk). A query with no
        visible key gets out 0, lse -inf and probabilities 0.
    """
    group = q.shape[2] // k.shape[2]
    q_BHSD, k_BHSD, v_BHSD = (x.to(compute_dtype).transpose(1, 2) for x in (q, k, v))
    k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) for x in (k_BHSD, v_BHSD))
    scores = (q_BHSD @ k_BHSD.transpose(-1, -2)) * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if alibi_slopes is not None:
        diagonal = torch.arange(seqlen_q, device=q.device).unsqueeze(-1) + (seqlen_k - seqlen_q)
        distance = (diagonal - torch.arange(seqlen_k, device=q.device)).abs()
        slopes = alibi_slopes.to(compute_dtype).reshape(-1, q.shape[2], 1, 1)
        scores = scores - slopes * distance
    visible = visibility(options, seqlen_q, seqlen_k, q.device)
    some_visible = visible.any(dim=-1)
    scores = scores.masked_fill(~visible, float("-inf"))
    # Rows that see nothing are filled with zeros before the logarithm, so that their gradients are 0 and not NaN.
    row_lse = torch.logsumexp(scores.masked_fill(~some_visible.unsqueeze(-1), 0.0), dim=-1)
    lse = row_lse.masked_fill(~some_visible, float("-inf"))
    probabilities = torch.exp(scores - lse.masked_fill(~some_visible, 0.0).unsqueeze(-1))
    weights = probabilities
    if options.dropout_p > 0:
        assert keep_mask is not None, "dropout needs an explicit keep_mask in the reference"
        weights = weights * keep_mask / (1.0 - options.dropout_p)
    out = (weights @ v_BHSD).transpose(1, 2).to(q.dtype)
    return ReferenceAttention(out, lse, probabilities)
