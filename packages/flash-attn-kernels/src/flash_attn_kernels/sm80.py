"""The sm80 path: tensor-core kernels (mma.sync, cp.async) for every NVIDIA GPU since Ampere.

Only used after :func:`library.load_error` has returned None.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import library
from .inputs import NO_MODIFIERS, AttentionInputs, Gradients
from .options import AttentionOptions

_UNBOUNDED = -1


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` in the layout of q with the head dim of v, in its dtype, and ``lse`` fp32: (B, H, Sq) or (H, Tq)."""
    q, k, v, options, modifiers, seed_and_offset, packed = inputs
    if packed is None and seed_and_offset is None and options.softcap == 0.0 and modifiers is NO_MODIFIERS:
        return library.sm80_forward_dense(q, k, v, options.softmax_scale, *_window(options), options.top_left)
    return library.sm80_forward(q, k, v, *_layout_and_options(inputs))


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
) -> Gradients:
    """Gradients of ``sum(dout * out) + sum(dlse * lse)``, each in the shape and dtype of its tensor in ``inputs``."""
    dq, dk, dv, dbias, dslopes_BH, dsink_BH = library.sm80_backward(
        dout,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        None if dlse is None else dlse.contiguous(),
        *_layout_and_options(inputs),
        inputs.options.deterministic,
        needs_attn_bias,
        needs_alibi_slopes,
        needs_learnable_sink,
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


def _layout_and_options(inputs: AttentionInputs) -> tuple[Any, ...]:
    """What forward and backward both take after their own tensors, in the order of the schemas."""
    packed, modifiers, options = inputs.packed, inputs.modifiers, inputs.options
    layout: tuple[Tensor | None, ...] = (None,) * 5
    if packed is not None:
        layout = (
            packed.cu_seqlens_q.contiguous(),
            packed.cu_seqlens_k.contiguous(),
            None if packed.seqused_q is None else packed.seqused_q.contiguous(),
            None if packed.seqused_k is None else packed.seqused_k.contiguous(),
            packed.block_table,
        )
    slopes, sink = modifiers.alibi_slopes, modifiers.learnable_sink
    return (
        *layout,
        modifiers.attn_bias,
        modifiers.attn_mask,
        modifiers.key_padding_mask,
        None if slopes is None else slopes.float().contiguous(),
        None if sink is None else sink.float().contiguous(),
        inputs.seed_and_offset,
        options.softmax_scale,
        *_window(options),
        options.top_left,
        options.softcap,
        options.dropout_p,
    )


def _window(options: AttentionOptions) -> tuple[int, int]:
    left, right = options.window_left, options.window_right
    return _UNBOUNDED if left is None else left, _UNBOUNDED if right is None else right
