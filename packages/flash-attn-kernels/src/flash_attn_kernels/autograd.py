"""Running a checked call on its path, and differentiating it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import portable, portable_operators, sm80, sm90
from .autocast import autocast_is_on, autocast_switched_off
from .inputs import NO_MODIFIERS, AttentionInputs, Gradients, PackedLayout, ScoreModifiers
from .options import AttentionOptions
from .second_derivative import once_differentiable

# The portable path where lengths cannot be read, see _has_no_values.
_PORTABLE_OPERATORS = "portable_operators"
PATHS: dict[str, Any] = {
    "sm90": sm90,
    "sm80": sm80,
    "portable": portable,
    _PORTABLE_OPERATORS: portable_operators,
}

_COMPILED_PATHS = ("sm90", "sm80")

_MODIFIERS = 5  # fields of ScoreModifiers, and which of them have gradients
_ATTN_BIAS, _ALIBI_SLOPES, _LEARNABLE_SINK = 0, 3, 4


# Everything about a call that is not a tensor: options, path, whether lse is a result, and which groups of tensors
# follow q, k and v: modifiers, seed, layout. A plain tuple, as it is made in every call.
_Structure = tuple[AttentionOptions, str, bool, bool, bool, bool]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    modifiers: ScoreModifiers,
    seed_and_offset: Tensor | None,
    packed: PackedLayout | None,
    path: str,
    needs_gradient: bool,
    returns_lse: bool,
    heads: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the call on ``path``; without ``needs_gradient`` nothing is recorded or kept.

    Without ``returns_lse`` the second may be None: autograd spends time on every result. ``heads`` (..., H + 2 Hk, D)
    is what q, k and v are views of, if they follow each other in one tensor, whose gradient is then made in one piece.
    """
    if packed is not None and path == "portable" and _has_no_values(packed.cu_seqlens_q):
        path = _PORTABLE_OPERATORS
    is_plain = modifiers is NO_MODIFIERS and seed_and_offset is None and packed is None
    if not needs_gradient:
        if is_plain:
            return PATHS[path].plain_forward(q, k, v, options)
        return PATHS[path].forward(AttentionInputs(q, k, v, options, modifiers, seed_and_offset, packed))
    if is_compiling() or torch._C._are_functorch_transforms_active():
        # The latter says what it cannot do.
        apply, apply_to_heads = _Attention.apply, _AttentionOfHeads.apply
    else:
        apply, apply_to_heads = _apply_without_functorch, _apply_to_heads_without_functorch
    if is_compiling():
        # It refuses a tensor that is passed twice to one autograd.Function, as k and v or both cu_seqlens may be.
        k, v = k.view_as(k), v.view_as(v)
        if packed is not None:
            packed = packed._replace(cu_seqlens_k=packed.cu_seqlens_k.view_as(packed.cu_seqlens_k))
            if packed.seqused_k is not None:
                packed = packed._replace(seqused_k=packed.seqused_k.view_as(packed.seqused_k))
    if is_plain and heads is None:  # no groups to put together
        results = apply(q, k, v, (options, path, returns_lse, False, False, False))
        return results if returns_lse else (results, None)
    has_modifiers, has_seed = modifiers is not NO_MODIFIERS, seed_and_offset is not None
    structure = (options, path, returns_lse, has_modifiers, has_seed, packed is not None)
    others: tuple[Tensor | None, ...] = modifiers if has_modifiers else ()
    if has_seed:
        others = (*others, seed_and_offset)
    if packed is not None:
        others = (*others, *packed)
    if heads is None:
        results = apply(q, k, v, structure, *others)
    else:
        results = apply_to_heads(heads, q.shape[-2], structure, *others)
    return results if returns_lse else (results, None)


def _has_no_values(x: Tensor) -> bool:
    """While a graph is traced, and of tensors that only have shapes."""
    return is_compiling() or x.is_meta or isinstance(x, torch._subclasses.FakeTensor)


def attend_without_autocast(q: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`attend`, with autocast switched off on the device of q."""
    with autocast_switched_off(q):
        return attend(q, *others)


class _Attention(torch.autograd.Function):
    """out, or (out, lse), with gradients to q, k, v, attn_bias, alibi_slopes and learnable_sink.

    ``others`` are the groups of tensors that the structure names. They are passed one by one, since autograd and
    torch.compile look for tensors only there, and by groups, since every argument costs time, an absent one too.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, structure: _Structure, *others: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, structure, others)
        ctx.save_for_backward(q, k, v, out, lse, *others)
        return _results(ctx, structure, out, lse)

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        of_inputs, of_others = _gradients(
            (q, k, v), ctx.structure, others, needed, out, lse, dout, dlse, one_gradient=False
        )
        return *of_inputs, None, *of_others


class _AttentionOfHeads(torch.autograd.Function):
    """The same of q, k and v that follow each other in one tensor ``heads`` (..., H + 2 Hk, D).

    Its gradient is made in one piece. Of three views of the tensor autograd would put three gradients together, which
    reads and writes all of them once more.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, query_heads: int, structure: _Structure, *others: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = split_heads(heads, query_heads)
        out, lse = _forward(q, k, v, structure, others)
        ctx.save_for_backward(heads, out, lse, *others)
        ctx.query_heads = query_heads
        return _results(ctx, structure, out, lse)

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        heads, out, lse, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        of_inputs, of_others = _gradients(
            *(split_heads(heads, ctx.query_heads), ctx.structure, others, needed, out, lse, dout, dlse),
            one_gradient=True,
        )
        return of_inputs[0], None, None, *of_others


def split_heads(heads: Tensor, query_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(..., H + 2 Hk, D) to q, k and v, as views."""
    key_heads = (heads.shape[-2] - query_heads) // 2
    q, k, v = heads.split((query_heads, key_heads, key_heads), dim=-2)
    return q, k, v


def _forward(
    q: Tensor, k: Tensor, v: Tensor, structure: _Structure, others: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    options, path, *_ = structure
    if others:
        return PATHS[path].forward(_inputs(q, k, v, structure, others))
    return PATHS[path].plain_forward(q, k, v, options)


def _results(ctx: Any, structure: _Structure, out: Tensor, lse: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What a forward returns, and what its backward knows of it."""
    ctx.structure = structure
    _, _, returns_lse, *_ = structure
    if not returns_lse:
        return out
    ctx.set_materialize_grads(False)
    return out, lse


# Function.apply without its Python, which serves the transforms of torch.func alone and takes a tenth of a call's time.
_apply_without_functorch = super(torch.autograd.Function, _Attention).apply
_apply_to_heads_without_functorch = super(torch.autograd.Function, _AttentionOfHeads).apply


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    structure: _Structure,
    others: list[Tensor | None],
    needed: tuple[bool, ...],
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    *,
    one_gradient: bool,
) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """Gradients of q, k and v, or the one of all their heads, and those of ``others``, where they are ``needed``."""
    q, k, v = inputs
    _, path, _, has_modifiers, *_ = structure
    of_others: list[Tensor | None] = [None] * len(others)
    if dout is None and dlse is None:
        return (None, None, None), of_others
    if dout is None:
        dout = torch.zeros_like(out)
    if not has_modifiers:
        needed = (False,) * _MODIFIERS
    with autocast_switched_off(q) if autocast_is_on(q) else nullcontext():
        gradients: Gradients = PATHS[path].backward(
            _inputs(q, k, v, structure, others),
            out,
            lse,
            dout,
            dlse,
            needs_attn_bias=needed[_ATTN_BIAS],
            needs_alibi_slopes=needed[_ALIBI_SLOPES],
            needs_learnable_sink=needed[_LEARNABLE_SINK],
            **({"one_gradient": True} if one_gradient and path in _COMPILED_PATHS else {}),
        )
    if has_modifiers:
        of_others[_ATTN_BIAS] = gradients.attn_bias
        of_others[_ALIBI_SLOPES] = gradients.alibi_slopes
        of_others[_LEARNABLE_SINK] = gradients.learnable_sink
    of_inputs = gradients.q, gradients.k, gradients.v
    if one_gradient and path not in _COMPILED_PATHS:
        of_inputs = torch.cat(of_inputs, dim=-2), gradients.k, gradients.v
    return of_inputs, of_others


def _inputs(q: Tensor, k: Tensor, v: Tensor, structure: _Structure, others: Any) -> AttentionInputs:
    options, _, _, has_modifiers, has_seed, is_packed = structure
    if not others:
        return AttentionInputs(q, k, v, options, NO_MODIFIERS)
    modifiers = ScoreModifiers(*others[:_MODIFIERS]) if has_modifiers else NO_MODIFIERS
    seed_and_offset = others[_MODIFIERS if has_modifiers else 0] if has_seed else None
    layout = others[(_MODIFIERS if has_modifiers else 0) + (1 if has_seed else 0) :]
    return AttentionInputs(
        q, k, v, options, modifiers, seed_and_offset, PackedLayout(*layout) if is_packed else None
    )
