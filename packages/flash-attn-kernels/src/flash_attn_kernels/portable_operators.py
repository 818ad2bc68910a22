"""The portable path of packed calls as operators, for torch.compile and torch.export.

Where sequences begin is read on the host, which a graph would have to be broken for; an operator is not looked into.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import portable
from .autocast import autocast_switched_off
from .blockwise_scores import compute_dtype
from .inputs import AttentionInputs, Gradients, PackedLayout, ScoreModifiers
from .options import AttentionOptions
from .registration import register_operator

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k,"
    " Tensor? block_table, Tensor? attn_bias, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? alibi_slopes,"
    " Tensor? learnable_sink, Tensor? seed_and_offset, float softmax_scale, int? window_left, int? window_right,"
    " float softcap, float dropout_p, bool deterministic, bool top_left"
)
_RESULTS = (
    "Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool needs_attn_bias, bool needs_alibi_slopes,"
    " bool needs_learnable_sink"
)
_FORWARD_SCHEMA = f"({_INPUTS}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = f"({_INPUTS}, {_RESULTS}) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)"
_INPUT_COUNT = _INPUTS.count(",") + 1


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """As :func:`portable.forward`."""
    return _forward(*_flat(inputs))


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
    """As :func:`portable.backward`."""
    needed = needs_attn_bias, needs_alibi_slopes, needs_learnable_sink
    return Gradients(*_backward(*_flat(inputs), out, lse, dout, dlse, *needed))


def _flat(inputs: AttentionInputs) -> tuple[Any, ...]:
    q, k, v, options, modifiers, seed_and_offset, packed = inputs
    assert packed is not None, "dense calls need no operator"
    return (
        *(q, k, v, *packed, *modifiers, seed_and_offset),
        *(options.softmax_scale, options.window_left, options.window_right, options.softcap),
        *(options.dropout_p, options.deterministic, options.top_left),
    )


def _inputs(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> AttentionInputs:
    layout, modifiers, seed_and_offset, options = others[:5], others[5:10], others[10], others[11:]
    return AttentionInputs(
        *(q, k, v, AttentionOptions(*options), ScoreModifiers(*modifiers), seed_and_offset),
        PackedLayout(*layout),
    )


def _run_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    with autocast_switched_off(inputs[0]):
        return portable.forward(_inputs(*inputs))


def _run_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, (out, lse, dout, dlse, *needed) = arguments[:_INPUT_COUNT], arguments[_INPUT_COUNT:]
    needs_attn_bias, needs_alibi_slopes, needs_learnable_sink = needed
    with autocast_switched_off(inputs[0]):
        return portable.backward(
            _inputs(*inputs),
            out,
            lse,
            dout,
            dlse,
            needs_attn_bias=needs_attn_bias,
            needs_alibi_slopes=needs_alibi_slopes,
            needs_learnable_sink=needs_learnable_sink,
        )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse = q.new_empty((heads, tokens), dtype=compute_dtype(q.dtype))
    return q.new_empty((tokens, heads, v.shape[-1])), lse


def _fake_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    q, k, v, _, modifiers, *_ = _inputs(*arguments[:_INPUT_COUNT])
    modified = modifiers.attn_bias, modifiers.alibi_slopes, modifiers.learnable_sink
    gradients = (
        x.new_empty(x.shape) if needed and x is not None else None
        for needed, x in zip(arguments[-3:], modified, strict=True)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *gradients


_forward = register_operator("portable_packed_forward", _FORWARD_SCHEMA, _run_forward, _fake_forward)
_backward = register_operator("portable_packed_backward", _BACKWARD_SCHEMA, _run_backward, _fake_backward)
