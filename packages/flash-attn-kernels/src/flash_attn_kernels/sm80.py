"""The sm80 path: tensor-core kernels (mma.sync, cp.async) for every NVIDIA GPU since Ampere.

Only used after :func:`library.load_error` has returned None.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import library
from .inputs import NO_MODIFIERS, AttentionInputs, Gradients
from .operator_arguments import is_full_or_causal, lengths, per_head, window
from .options import AttentionOptions


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` in the layout of q with the head dim of v, in its dtype, and ``lse`` fp32: (B, H, Sq) or (H, Tq)."""
    q, k, v, options, *_ = inputs
    return library.sm80_forward(
        q,
        k,
        v,
        options.softmax_scale,
        *window(options),
        options.top_left,
        *_optional_arguments(inputs),
    )


def plain_forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """:func:`forward` of a dense call without modifiers and dropout, which takes less time."""
    if is_full_or_causal(options):
        return library.sm80_forward_dense(q, k, v, options.softmax_scale, options.window_right == 0)
    return library.sm80_forward(
        q, k, v, options.softmax_scale, *window(options), options.top_left, options.softcap
    )


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    needs_attn_bias: bool,
    needs_alibi_slopes: bool,
    needs_learnable_sink: bool,
    one_gradient: bool = False,
    operator: Any = None,
) -> Gradients:
    """Gradients of ``sum(dout * out) + sum(dlse * lse)``, each in the shape and dtype of its tensor in ``inputs``.

    With ``one_gradient`` the first is that of all heads of q, k and v in one tensor (..., H + 2 Hk, D), and those of k
    and v have no elements. ``operator`` takes the arguments of ``library.sm80_backward``, which is the default.
    """
    q, k, v, options, *_ = inputs
    left, right = window(options)
    optional: tuple[Any, ...] = ()
    named = {"one_gradient": True} if one_gradient else {}
    if dlse is not None or not _is_plain(inputs):
        optional = (
            *_optional_arguments(inputs),
            None if dlse is None else dlse.contiguous(),
            needs_attn_bias,
            needs_alibi_slopes,
            needs_learnable_sink,
        )
    dq, dk, dv, dbias, dslopes_BH, dsink_BH = (operator or library.sm80_backward)(
        dout,
        q,
        k,
        v,
        out,
        lse,
        options.deterministic,
        options.softmax_scale,
        left,
        right,
        options.top_left,
        *optional,
        **named,
    )
    modifiers = inputs.modifiers
    attn_bias = alibi_slopes = learnable_sink = None
    if needs_attn_bias and modifiers.attn_bias is not None:
        attn_bias = dbias.to(modifiers.attn_bias.dtype)
    if needs_alibi_slopes and modifiers.alibi_slopes is not None:
        if modifiers.alibi_slopes.shape[0] != dslopes_BH.shape[0]:  # one set of slopes for the batch
            dslopes_BH = dslopes_BH.sum(dim=0, keepdim=True)
        alibi_slopes = dslopes_BH.to(modifiers.alibi_slopes.dtype)
    if needs_learnable_sink and modifiers.learnable_sink is not None:
        learnable_sink = dsink_BH.sum(dim=0).to(modifiers.learnable_sink.dtype)
    return Gradients(dq, dk, dv, attn_bias, alibi_slopes, learnable_sink)


def _is_plain(inputs: AttentionInputs) -> bool:
    """Nothing is given that an operator has a default for: it is then left out of the call, which costs less."""
    _, _, _, options, modifiers, seed_and_offset, packed = inputs
    return packed is None and seed_and_offset is None and options.softcap == 0.0 and modifiers is NO_MODIFIERS


def _optional_arguments(inputs: AttentionInputs) -> tuple[Any, ...]:
    """What forward and backward both have defaults for, in the order of the schemas."""
    _, _, _, options, modifiers, seed_and_offset, packed = inputs
    layout = (None,) * 5 if packed is None else (*lengths(packed), packed.block_table)
    return (
        options.softcap,
        options.dropout_p,
        *layout,
        modifiers.attn_bias,
        modifiers.attn_mask,
        modifiers.key_padding_mask,
        per_head(modifiers.alibi_slopes),
        per_head(modifiers.learnable_sink),
        seed_and_offset,
    )
