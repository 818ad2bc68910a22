"""Attention of separate q, k and v: dense, and packed sequences of different lengths.

Names, order of tensors and keywords are FlashAttention-2.8's; what goes beyond them is keyword-only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import run
from .inputs import PackedLayout


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    r"""Exact attention ``softmax(softmax_scale * q k^T + attn_bias) v`` without the quadratic matrix.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv). H is a multiple of Hk; query head h reads key head
            ``h // (H / Hk)``. float16, bfloat16, float32 or float64, the same for all; any strides.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        softmax_scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: key j is visible to query i iff ``j <= i + Sk - Sq`` (aligned at the bottom right).
        window_size: ``(left, right)``: visible iff ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``; -1 is unbounded.
        softcap: products become ``softcap * tanh(softmax_scale * q k^T / softcap)``, before any bias; 0 is off.
        alibi_slopes: (H,) or (B, H); adds ``-slope * |i + Sk - Sq - j|`` to the scores. Differentiable.
        deterministic: bitwise equal gradients from run to run; also on under
            ``torch.use_deterministic_algorithms(True)``.
        return_attn_probs: return ``(out, lse, probabilities)``; the probabilities are (B, H, Sq, Sk), normalised,
            with the sign bit set where dropout removed an element. Quadratic memory: for inspection only.
        attn_bias: added to the scores; float16, bfloat16 or float32 (float64 with float64 inputs), of a shape that
            broadcasts to (B, H, Sq, Sk) and is never expanded in memory. Differentiable.
        attn_mask: bool, of a shape that broadcasts likewise; True is visible.
        key_padding_mask: bool (B, Sk), True is a real key. The others are seen by no query and may hold NaN.
        learnable_sink: (H,), one more logit in every softmax of head h, without a value. Differentiable.
        causal_alignment: "bottom-right", or "top-left", which replaces ``Sk - Sq`` by 0 in ``causal``, ``window_size``
            and ``alibi_slopes``.
        return_lse: return ``(out, lse)``. Both are differentiable.
        strict: raise if no compiled kernel runs the call, instead of warning.

    Returns:
        out (B, Sq, H, Dv) in the dtype of q. lse (B, H, Sq) in fp32 (fp64 for fp64 inputs) is the natural logarithm
        of the softmax denominator. A query that sees no key gets out 0, lse -inf (the logit of the sink, if there is
        one) and gradients 0.

    Raises:
        ValueError: for tensors or options that do not fit together, naming the argument and the fix; with
            ``strict``, if the portable path would run.

    Source: Dao, "FlashAttention-2", 2023.
    """
    return run(
        q,
        k,
        v,
        None,
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    """Attention over packed sequences of different lengths, each attending only to itself.

    Args:
        q: (Tq, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv). Token t of sequence b is row ``cu_seqlens[b] + t``.
        cu_seqlens_q: int32 (B + 1,), cumulative query lengths starting at 0. cu_seqlens_k: likewise for keys.
            Sequences may be empty; rows after the last one may hold anything.
        max_seqlen_q: capacity hint; it never changes results. max_seqlen_k: likewise.
        block_table: int32 (B, max_pages): k and v are then pages (num_pages, page_size, Hk, D), and key t of sequence
            b is row ``t % page_size`` of page ``block_table[b, t // page_size]``.
        return_attn_probs: return ``(out, lse, probabilities)``; the probabilities are (B, H, longest Sq, longest Sk),
            0 past the end of a sequence.
        seqused_q: int32 (B,): only the first ``seqused_q[b]`` queries of sequence b exist; the rows of the others may
            hold anything. seqused_k: likewise for keys.
        attn_bias: of a shape that broadcasts to (B, H, longest Sq, longest Sk), rows and columns being positions
            inside a sequence; 0 past its end. attn_mask: likewise, invisible past its end.
        key_padding_mask: bool (B, longest Sk), invisible past its end.

    The other arguments are those of :func:`flash_attn_func`; causal and window masks use each sequence's own lengths.

    Returns:
        out (Tq, H, Dv); with ``return_lse`` also lse (H, Tq). Rows that belong to no sequence get 0 and -inf.

    Raises:
        ValueError: as :func:`flash_attn_func`, and for cumulative lengths of a wrong dtype, device or order.
    """
    del max_seqlen_q, max_seqlen_k  # hints: the paths read the lengths themselves
    return run(
        q,
        k,
        v,
        PackedLayout(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )
