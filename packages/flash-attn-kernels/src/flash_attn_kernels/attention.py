"""The public attention functions: check, choose a path, run it, differentiate it.

The names, the order of tensors and the keywords are FlashAttention-2.8's; what goes beyond them is keyword-only.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from . import checks, library, portable, sm80
from .dispatch import AttentionProblem, Explanation, choose_path
from .errors import bad_argument
from .inputs import AttentionInputs, PackedLayout
from .options import AttentionOptions, make_options
from .philox import draw_seed_and_offset
from .tracing import constant_under_compile

_PATHS = {"sm80": sm80, "portable": portable}


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
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    r"""Exact attention ``softmax(softmax_scale * q k^T) v`` without the quadratic matrix.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv). H is a multiple of Hk; query head h reads key head
            ``h // (H / Hk)``. Any floating-point dtype, the same for all; any strides.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        softmax_scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: key j is visible to query i iff ``j <= i + Sk - Sq`` (aligned at the bottom right).
        window_size: ``(left, right)``: visible iff ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``; -1 is unbounded.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 switches it off.
        alibi_slopes: (H,) or (B, H); adds ``-slope * |i + Sk - Sq - j|`` to the scores. Differentiable.
        deterministic: bitwise equal gradients from run to run; also on under
            ``torch.use_deterministic_algorithms(True)``.
        return_attn_probs: return ``(out, lse, probabilities)``; the probabilities are (B, H, Sq, Sk), normalised,
            with the sign bit set where dropout removed an element. Quadratic memory: for inspection only.
        return_lse: return ``(out, lse)``. Both are differentiable.
        strict: raise if no compiled kernel runs the call, instead of warning.

    Returns:
        out (B, Sq, H, Dv) in the dtype of q. lse (B, H, Sq) in fp32 (fp64 for fp64 inputs) is the natural logarithm
        of the softmax denominator. A query that sees no key gets out 0, lse -inf and gradients 0.

    Raises:
        ValueError: for tensors or options that do not fit together, naming the argument and the fix; with
            ``strict``, if the portable path would run.

    Source: Dao, "FlashAttention-2", 2023.
    """
    checks.check_tensors(q, k, v, layout="dense")
    checks.check_alibi_slopes(alibi_slopes, q, q.shape[0])
    options = _options(q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    inputs = _inputs(q, k, v, options, alibi_slopes, None)
    path = _choose_path(inputs, strict)
    out, lse = _attend(inputs, path)
    if return_attn_probs:
        return out, lse, portable.probabilities(_detached(inputs), lse.detach())
    return (out, lse) if return_lse else out


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
        return_attn_probs: not available for packed sequences.

    The other arguments are those of :func:`flash_attn_func`; causal and window masks use each sequence's own lengths.

    Returns:
        out (Tq, H, Dv); with ``return_lse`` also lse (H, Tq). Rows that belong to no sequence get 0 and -inf.

    Raises:
        ValueError: as :func:`flash_attn_func`, and for cumulative lengths of a wrong dtype, device or order.
    """
    del max_seqlen_q, max_seqlen_k  # hints: the paths read the lengths themselves
    if return_attn_probs:
        raise bad_argument(
            "return_attn_probs",
            True,
            "False for packed sequences",
            "call flash_attn_func on one sequence at a time",
        )
    packed = PackedLayout(cu_seqlens_q, cu_seqlens_k, block_table)
    _check_packed(q, k, v, packed, alibi_slopes)
    options = _options(q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    inputs = _inputs(q, k, v, options, alibi_slopes, packed)
    out, lse = _attend(inputs, _choose_path(inputs, strict))
    return (out, lse) if return_lse else out


def explain(
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
    return_lse: bool = False,
    strict: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Explanation:
    """Which path a call with these arguments takes, and why each faster one is passed over. Computes nothing.

    Takes the arguments of :func:`flash_attn_func`; give ``cu_seqlens_q`` and ``cu_seqlens_k`` (and ``block_table``) by
    keyword to ask about :func:`flash_attn_varlen_func`.
    """
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = PackedLayout(cu_seqlens_q, cu_seqlens_k, block_table)
        _check_packed(q, k, v, packed, alibi_slopes)
    else:
        checks.check_tensors(q, k, v, layout="dense")
        checks.check_alibi_slopes(alibi_slopes, q, q.shape[0])
    options = _options(q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    q, k, v = _autocast(q, k, v)
    return choose_path(_problem(AttentionInputs(q, k, v, options, alibi_slopes, packed=packed)))


class _Attention(torch.autograd.Function):
    """(out, lse) with gradients to q, k, v and the ALiBi slopes, on whichever path was chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        seed_and_offset: Tensor | None,
        options: AttentionOptions,
        packed: PackedLayout | None,
        path: str,
    ) -> tuple[Tensor, Tensor]:
        inputs = AttentionInputs(q, k, v, options, alibi_slopes, seed_and_offset, packed)
        out, lse = _PATHS[path].forward(inputs)
        layout = () if packed is None else (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.block_table)
        ctx.save_for_backward(q, k, v, alibi_slopes, seed_and_offset, out, lse, *layout)
        ctx.options, ctx.path = options, path
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, alibi_slopes, seed_and_offset, out, lse, *layout = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        if dout is None:
            dout = torch.zeros_like(out)
        packed = PackedLayout(*layout) if layout else None
        inputs = AttentionInputs(q, k, v, ctx.options, alibi_slopes, seed_and_offset, packed)
        dq, dk, dv, dslopes = _PATHS[ctx.path].backward(inputs, out, lse, dout, dlse)
        return dq, dk, dv, dslopes, None, None, None, None


def _attend(inputs: AttentionInputs, path: str) -> tuple[Tensor, Tensor]:
    return _Attention.apply(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.alibi_slopes,
        inputs.seed_and_offset,
        inputs.options,
        inputs.packed,
        path,
    )


def _detached(inputs: AttentionInputs) -> AttentionInputs:
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.detach()
    return AttentionInputs(
        inputs.q.detach(),
        inputs.k.detach(),
        inputs.v.detach(),
        inputs.options,
        slopes,
        inputs.seed_and_offset,
    )


def _check_packed(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, alibi_slopes: Tensor | None) -> None:
    checks.check_tensors(q, k, v, layout="packed" if packed.block_table is None else "paged")
    checks.check_cu_seqlens("cu_seqlens_q", packed.cu_seqlens_q, q)
    checks.check_cu_seqlens("cu_seqlens_k", packed.cu_seqlens_k, q)
    batch = packed.cu_seqlens_q.numel() - 1
    if packed.cu_seqlens_k.numel() - 1 != batch:
        raise bad_argument(
            "cu_seqlens_k",
            f"{packed.cu_seqlens_k.numel() - 1} sequences",
            f"the {batch} of cu_seqlens_q",
            "align them",
        )
    checks.check_cu_seqlens_range("cu_seqlens_q", packed.cu_seqlens_q, q.shape[0])
    if packed.block_table is None:
        checks.check_cu_seqlens_range("cu_seqlens_k", packed.cu_seqlens_k, k.shape[0])
    else:
        checks.check_block_table(packed.block_table, batch, q)
    checks.check_alibi_slopes(alibi_slopes, q, batch)


def _options(
    q: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> AttentionOptions:
    return make_options(
        head_dim=q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast attention runs in the autocast dtype, as matrix products do."""
    device_type = q.device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    alibi_slopes: Tensor | None,
    packed: PackedLayout | None,
) -> AttentionInputs:
    q, k, v = _autocast(q, k, v)
    seed_and_offset = draw_seed_and_offset(q.device) if options.dropout_p > 0 else None
    return AttentionInputs(q, k, v, options, alibi_slopes, seed_and_offset, packed)


def _problem(inputs: AttentionInputs) -> AttentionProblem:
    layout = "dense"
    if inputs.packed is not None:
        layout = "packed" if inputs.packed.block_table is None else "paged"
    device, options = inputs.q.device, inputs.options
    return AttentionProblem(
        device_type=device.type,
        compute_capability=_compute_capability(device.index) if device.type == "cuda" else None,
        dtype=inputs.q.dtype,
        head_dim=inputs.q.shape[-1],
        head_dim_v=inputs.v.shape[-1],
        layout=layout,
        softmax_scale_is_positive=options.softmax_scale > 0,
        has_softcap=options.softcap > 0,
        has_alibi=inputs.alibi_slopes is not None,
        has_dropout=options.dropout_p > 0,
        library_error=library.load_error() if device.type == "cuda" else None,
    )


def _choose_path(inputs: AttentionInputs, strict: bool) -> str:
    explanation = choose_path(_problem(inputs))
    if explanation.path == "portable":
        reasons = "; ".join(explanation.reasons)
        if strict:
            raise ValueError(
                f"strict: got a call that no compiled kernel can run ({reasons}); expected one it can. "
                "Fix: change what the reasons name, or pass strict=False for the portable path."
            )
        if inputs.q.device.type == "cuda":
            _warn_once(reasons)
    return explanation.path


# torch.compile asks these once, while tracing, and treats the answers as constants.


@constant_under_compile
def _compute_capability(device_index: int | None) -> tuple[int, int] | None:
    """None where there is no such device to ask, as under FakeTensor on a machine without a GPU."""
    return _cached_compute_capability(device_index)


@functools.cache
def _cached_compute_capability(device_index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device_index) if torch.cuda.is_available() else None


@constant_under_compile
def _warn_once(reasons: str) -> None:
    if reasons not in _warned_reasons:
        _warned_reasons.add(reasons)
        warnings.warn(
            f"attention runs on the portable path, which is slow on a GPU, because: {reasons}. "
            "explain() gives this reason too; strict=True raises instead.",
            stacklevel=4,
        )


_warned_reasons: set[str] = set()
