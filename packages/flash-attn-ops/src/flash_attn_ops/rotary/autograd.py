"""Rotations of the heads of one tensor, or of two, under autograd; by the kernel or by the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.dispatch import once_for_like_calls, runs_on_triton
from flash_attn_ops.library import apply, tell_autograd

from . import operators, reference
from .checks import Positions, Tables

Options = tuple[Any, ...]  # of an operator, except for the last, ``conjugate``


def rotate_heads(
    x: Tensor,
    counts: tuple[int, int],
    tables: Tables,
    positions: Positions,
    interleaved: bool,
    inplace: bool,
) -> Tensor:
    """x (..., heads, D), or (..., parts, H, D) for parts * H heads: the first ``counts[0]`` of them turned by cos and
    sin, ``counts[1]`` behind them by the tables of keys, and the rest as they are."""
    if not _on_triton((x, tables.cos, tables.sin), "apply_rotary_emb"):
        out = _by_reference(_as_heads(x, positions), counts, tables, positions, interleaved)
        return x.copy_(out.view(x.shape)) if inplace else out.view(x.shape)
    options = _options(tables, positions, interleaved)
    if torch.is_grad_enabled() and x.requires_grad:
        return apply(_RotateHeads, x, counts, _num_token_dims(positions), inplace, False, *options)
    heads = _as_heads(x, positions)
    if not inplace:
        out = operators.rotate_heads(heads, *counts, *options, False)
        return out if heads is x else out.view(x.shape)
    operators.rotate_heads_(heads, *counts, *options, False)
    tell_autograd(x)
    return x


def rotate_pair(
    q: Tensor, k: Tensor, tables: Tables, positions: Positions, interleaved: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their tables."""
    cos, sin, cos_k, sin_k = tables
    key_tables = Tables(cos, sin) if cos_k is None or sin_k is None else Tables(cos_k, sin_k)
    with_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    # Autograd lets a function overwrite a view only if it has one result.
    apart = inplace and with_grad and (torch.compiler.is_compiling() or q._is_view() or k._is_view())
    if apart or not _on_triton((q, k, cos, sin), "apply_rotary_emb_qk"):
        return (
            rotate_heads(q, (q.shape[-2], 0), Tables(cos, sin), positions, interleaved, inplace),
            rotate_heads(k, (k.shape[-2], 0), key_tables, positions, interleaved, inplace),
        )
    options = _options(tables, positions, interleaved)
    if with_grad:
        return apply(_RotatePair, q, k, inplace, False, *options)
    if not inplace:
        return operators.rotate_pair(q, k, *options, False)
    operators.rotate_pair_(q, k, *options, False)
    tell_autograd(q, k)
    return q, k


@once_for_like_calls
def _on_triton(tensors: tuple[Tensor, ...], operation: str) -> bool:
    return runs_on_triton(operation, *tensors)


class _RotateHeads(torch.autograd.Function):
    """A rotation is orthogonal, so its gradient is the rotation back; nothing of x is kept. (A table that scales too
    scales the gradient likewise.)"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: tuple[int, int],
        token_dims: int,
        inplace: bool,
        conjugate: bool,
        *options: Any,
    ) -> Tensor:
        _save(ctx, conjugate, options)
        ctx.counts, ctx.token_dims = counts, token_dims
        heads = _flatten_heads(x, token_dims)
        if not inplace:
            out = operators.rotate_heads(heads, *counts, *options, conjugate)
            return out if heads is x else out.view(x.shape)
        ctx.mark_dirty(x)
        operators.rotate_heads_(heads, *counts, *options, conjugate)
        return x

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # Never in place: other consumers of the gradient may hold the same memory.
        conjugate, options = _saved(ctx)
        if _is_differentiated_again(d_out):
            dx = _RotateHeads.apply(d_out, ctx.counts, ctx.token_dims, False, not conjugate, *options)
        else:
            heads = _flatten_heads(d_out, ctx.token_dims)
            dx = operators.rotate_heads(heads, *ctx.counts, *options, not conjugate)
            dx = dx if heads is d_out else dx.view(d_out.shape)
        return (dx, *[None] * (4 + len(options)))


class _RotatePair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, inplace: bool, conjugate: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, conjugate, options)
        if not inplace:
            return operators.rotate_pair(q, k, *options, conjugate)
        ctx.mark_dirty(q, k)
        operators.rotate_pair_(q, k, *options, conjugate)
        return q, k

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        conjugate, options = _saved(ctx)
        if _is_differentiated_again(dq, dk):
            dq, dk = _RotatePair.apply(dq, dk, False, not conjugate, *options)
        else:
            dq, dk = operators.rotate_pair(dq, dk, *options, not conjugate)
        return dq, dk, *[None] * (2 + len(options))


def _is_differentiated_again(*gradients: Tensor) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(gradient.requires_grad for gradient in gradients)


def _save(ctx: Any, conjugate: bool, options: Options) -> None:
    cos, sin, cos_k, sin_k, offsets, offset, cu_seqlens, position_ids, interleaved = options
    ctx.save_for_backward(cos, sin, cos_k, sin_k, offsets, cu_seqlens, position_ids)
    ctx.offset, ctx.interleaved, ctx.conjugate = offset, interleaved, conjugate


def _saved(ctx: Any) -> tuple[bool, Options]:
    """``conjugate`` and the options."""
    cos, sin, cos_k, sin_k, offsets, cu_seqlens, position_ids = ctx.saved_tensors
    options = (cos, sin, cos_k, sin_k, offsets, ctx.offset, cu_seqlens, position_ids, ctx.interleaved)
    return ctx.conjugate, options


def _options(tables: Tables, positions: Positions, interleaved: bool) -> Options:
    start = positions.seqlen_offsets
    offsets, offset = (start, 0) if isinstance(start, Tensor) else (None, start)
    return *tables, offsets, offset, positions.cu_seqlens, positions.position_ids, interleaved


def _num_token_dims(positions: Positions) -> int:
    packed = positions.cu_seqlens is not None
    return 1 if packed or (positions.position_ids is not None and positions.position_ids.dim() == 1) else 2


def _as_heads(x: Tensor, positions: Positions) -> Tensor:
    return _flatten_heads(x, _num_token_dims(positions))


def _flatten_heads(x: Tensor, token_dims: int) -> Tensor:
    return x if x.dim() == token_dims + 2 else x.flatten(token_dims, token_dims + 1)


def _by_reference(
    heads: Tensor, counts: tuple[int, int], tables: Tables, positions: Positions, interleaved: bool
) -> Tensor:
    offsets, cu_seqlens, _, position_ids = positions
    parts, start = [], 0
    for count, cos, sin in zip(counts, (tables.cos, tables.cos_k), (tables.sin, tables.sin_k), strict=True):
        part = heads[..., start : start + count, :]
        if cos is None or sin is None:
            cos, sin = tables.cos, tables.sin
        rows = reference.rows_of_tokens(part, cos, sin, offsets, cu_seqlens, position_ids)
        parts.append(reference.rotate(part, *rows, interleaved))
        start += count
    return torch.cat([*parts, heads[..., start:, :]], dim=-2)
