"""The definition of attention that every path is tested against: short, quadratic, in any precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import ScoreModifiers
from .options import AttentionOptions


class ReferenceAttention(NamedTuple):
    """Result of :func:`attention_reference`."""

    out: Tensor
    lse: Tensor
    probabilities: Tensor


def key_distance(options: AttentionOptions, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """int64 (Sq, Sk): how far right of a query's diagonal a key lies."""
    diagonal = torch.arange(seqlen_q, device=device) + options.diagonal_shift(seqlen_q, seqlen_k)
    return torch.arange(seqlen_k, device=device) - diagonal.unsqueeze(-1)


def visibility(options: AttentionOptions, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """bool (Sq, Sk): which key the window lets each query see."""
    distance = key_distance(options, seqlen_q, seqlen_k, device)
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
    modifiers: ScoreModifiers | None = None,
    keep_mask: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> ReferenceAttention:
    r"""Attention as textbooks write it, differentiable by autograd.

    .. math::
        s_{ij} = \mathrm{cap}(c\, q_i \cdot k_j) + \mathrm{bias}_{ij} - \mathrm{slope}\,|i + \mathrm{shift} - j|,
        \qquad
        o_i = \sum_j \frac{e^{s_{ij}}}{e^{\mathrm{sink}} + \sum_{j'} e^{s_{ij'}}}\, v_j

    over the visible keys, with ``cap(x) = softcap * tanh(x / softcap)`` and ``shift = Sk - Sq``, or 0 for ``top_left``.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv); query head h reads kv head ``h // (H / Hk)``.
        options: scale, window and alignment, softcap, dropout probability.
        modifiers: bias, mask, key padding, ALiBi slopes, sink; the floating-point ones are differentiable too.
        keep_mask: bool (B, H, Sq, Sk), required when ``options.dropout_p > 0``.
        compute_dtype: precision of every step; the output comes back in the dtype of q, the rest in this one.

    Returns:
        out (B, Sq, H, Dv), lse (B, H, Sq) natural log, undropped probabilities (B, H, Sq, Sk). A query with no
        visible key gets out 0, probabilities 0 and lse -inf or, with a sink, the sink's logit.
    """
    if modifiers is None:
        modifiers = ScoreModifiers()
    visible = visibility(options, q.shape[1], k.shape[1], q.device)
    if modifiers.attn_mask is not None:
        visible = visible & modifiers.attn_mask
    if modifiers.key_padding_mask is not None:
        real = modifiers.key_padding_mask[:, :, None, None]
        # Hidden keys may hold NaN, and 0 * NaN is NaN, so hiding their scores would not be enough.
        k, v = torch.where(real, k, 0.0), torch.where(real, v, 0.0)
        visible = visible & real.transpose(1, 3)
    group = q.shape[2] // k.shape[2]
    q_BHSD, k_BHSD, v_BHSD = (x.to(compute_dtype).transpose(1, 2) for x in (q, k, v))
    k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) for x in (k_BHSD, v_BHSD))
    scores = (q_BHSD @ k_BHSD.transpose(-1, -2)) * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if modifiers.attn_bias is not None:
        scores = scores + modifiers.attn_bias.to(compute_dtype)
    if modifiers.alibi_slopes is not None:
        slopes = modifiers.alibi_slopes.to(compute_dtype)[:, :, None, None]
        scores = scores - slopes * key_distance(options, q.shape[1], k.shape[1], q.device).abs()
    scores = logits = scores.masked_fill(~visible, float("-inf"))
    if modifiers.learnable_sink is not None:
        sink = modifiers.learnable_sink.to(compute_dtype).reshape(1, -1, 1, 1)
        logits = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
    nothing = (logits == float("-inf")).all(dim=-1)
    # Rows that see nothing are filled with zeros before the logarithm, so that their gradients are 0 and not NaN.
    lse = torch.logsumexp(logits.masked_fill(nothing.unsqueeze(-1), 0.0), dim=-1)
    probabilities = torch.exp(scores - lse.unsqueeze(-1))
    lse = lse.masked_fill(nothing, float("-inf"))
    weights = probabilities
    if options.dropout_p > 0:
        assert keep_mask is not None, "dropout needs an explicit keep_mask in the reference"
        weights = weights * keep_mask / (1.0 - options.dropout_p)
    out = (weights @ v_BHSD).transpose(1, 2).to(q.dtype)
    return ReferenceAttention(out, lse, probabilities)
