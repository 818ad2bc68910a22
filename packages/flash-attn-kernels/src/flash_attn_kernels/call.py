"""What every public attention function does with its arguments: check, choose a path, run it.

A call on tiny tensors costs little more than the Python it passes through, so what only depends on options, dtypes
and head dims is worked out once (``_cached_plan``), and tensors that are absent cost nothing.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, library, modifiers, portable
from .autocast import autocast_is_on, autocast_switched_off, to_autocast_dtype
from .dispatch import AttentionProblem, Explanation, choose_path
from .inputs import NO_MODIFIERS, AttentionInputs, PackedLayout, ScoreModifiers
from .options import AttentionOptions, make_options
from .philox import draw_seed_and_offset
from .tracing import constant_under_compile


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLayout | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    learnable_sink: Tensor | None,
    causal_alignment: str,
    return_lse: bool,
    strict: bool,
) -> Any:
    """out, (out, lse) or (out, lse, probabilities), as the public functions describe them."""
    q, k, v, autocast, score_modifiers, needs_gradient, options, explanation = prepare(
        q,
        k,
        v,
        packed,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        attn_bias,
        attn_mask,
        key_padding_mask,
        learnable_sink,
        causal_alignment,
    )
    if explanation.path == "portable":
        _object_to_the_portable_path(explanation.reasons["sm80"], q.device.type, strict)
    seed_and_offset = draw_seed_and_offset(q.device) if options.dropout_p > 0 else None
    call = (q, k, v, options, score_modifiers, seed_and_offset, packed, explanation.path, needs_gradient)
    if autocast:
        with autocast_switched_off(q):
            out, lse = autograd.attend(*call, return_lse or return_attn_probs)
    else:
        out, lse = autograd.attend(*call, return_lse or return_attn_probs)
    if return_attn_probs:
        assert lse is not None  # since it was asked for
        inputs = AttentionInputs(q, k, v, options, score_modifiers, seed_and_offset, packed)
        with torch.no_grad():
            return out, lse, portable.probabilities(inputs, lse)
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLayout | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    learnable_sink: Tensor | None,
    causal_alignment: str,
) -> tuple[Tensor, Tensor, Tensor, bool, ScoreModifiers, bool, AttentionOptions, Explanation]:
    """Check and normalise the arguments, and choose the path.

    Returns:
        q, k and v as the path gets them; whether autocast is on, and was applied to them; the modifiers; whether a
        gradient is needed; the options; the explanation.

    Raises:
        ValueError: for tensors or options that do not fit together.
    """
    autocast = isinstance(q, Tensor) and autocast_is_on(q)
    if autocast:
        device_type = q.device.type
        q, k, v = (to_autocast_dtype(x, device_type) for x in (q, k, v))
    if packed is None:
        layout = "dense"
        head_dim, head_dim_v = checks.check_tensors(q, k, v, layout=layout)
    else:
        layout = "packed" if packed.block_table is None else "paged"
        head_dim, head_dim_v = checks.check_packed(q, k, v, packed)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    grad_enabled = torch.is_grad_enabled()
    needs_gradient = grad_enabled and (q.requires_grad or k.requires_grad or v.requires_grad)
    sums_broadcast_bias = False
    score_modifiers = NO_MODIFIERS
    score_tensors: tuple[str, ...] = ()
    if not (
        attn_bias is None
        and attn_mask is None
        and key_padding_mask is None
        and alibi_slopes is None
        and learnable_sink is None
    ):
        score_modifiers = modifiers.make_modifiers(
            q, k, packed, attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink
        )
        score_tensors = modifiers.score_tensors(score_modifiers)
        if grad_enabled:
            bias = score_modifiers.attn_bias
            needs_gradient = (
                needs_gradient
                or (bias is not None and bias.requires_grad)
                or (alibi_slopes is not None and alibi_slopes.requires_grad)
                or (learnable_sink is not None and learnable_sink.requires_grad)
            )
            if deterministic and bias is not None and bias.requires_grad:
                sums_broadcast_bias = modifiers.is_broadcast(bias, q, k, packed)
    window: Any = (
        window_size if type(window_size) is tuple else tuple(window_size)
    )  # of a list, to be hashable
    plan = _plan if torch.compiler.is_compiling() else _cached_plan
    options, explanation = plan(
        q.device,
        q.dtype,
        head_dim,
        head_dim_v,
        layout,
        None if softmax_scale is None else float(softmax_scale),
        causal,
        window,
        float(softcap),
        float(dropout_p),
        deterministic,
        causal_alignment,
        needs_gradient,
        sums_broadcast_bias,
        score_tensors,
    )
    return q, k, v, autocast, score_modifiers, needs_gradient, options, explanation


def _plan(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    layout: str,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    causal_alignment: str,
    needs_gradient: bool,
    sums_broadcast_bias: bool,
    score_tensors: tuple[str, ...],
) -> tuple[AttentionOptions, Explanation]:
    """The options and the path of every call that agrees in these arguments."""
    # torch.compile may trace a number as a symbol; asking for its parts makes it a constant of the graph.
    head_dim, head_dim_v = operator.index(head_dim), operator.index(head_dim_v)
    options = make_options(
        head_dim=head_dim,
        softmax_scale=None if softmax_scale is None else math.ldexp(*math.frexp(softmax_scale)),
        causal=causal,
        window_size=window_size,
        softcap=math.ldexp(*math.frexp(softcap)),
        dropout_p=math.ldexp(*math.frexp(dropout_p)),
        deterministic=deterministic,
        causal_alignment=causal_alignment,
    )
    problem = AttentionProblem(
        device_type=device.type,
        compute_capability=_compute_capability(device.index) if device.type == "cuda" else None,
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        layout=layout,
        softmax_scale=options.softmax_scale,
        has_dropout=options.dropout_p > 0.0,
        score_tensors=score_tensors,
        deterministic=options.deterministic,
        needs_gradient=needs_gradient,
        sums_broadcast_bias=sums_broadcast_bias,
        library_error=library.load_error() if device.type == "cuda" else None,
    )
    return options, choose_path(problem)


# Bounded, since scales and windows may be computed anew for every call.
_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _object_to_the_portable_path(reasons: tuple[str, ...], device_type: str, strict: bool) -> None:
    text = "; ".join(reasons)
    if strict:
        raise ValueError(
            f"strict: got a call that no compiled kernel can run ({text}); expected one it can. "
            "Fix: change what the reasons name, or pass strict=False for the portable path."
        )
    if device_type == "cuda":
        _warn_once(text)


# torch.compile asks these once, while tracing, and treats the answers as constants.


@constant_under_compile
def _compute_capability(device_index: int | None) -> tuple[int, int] | None:
    """None where there is no such device to ask, as under FakeTensor on a machine without a GPU."""
    return torch.cuda.get_device_capability(device_index) if torch.cuda.is_available() else None


@constant_under_compile
def _warn_once(reasons: str) -> None:
    if reasons not in _warned_reasons:
        _warned_reasons.add(reasons)
        warnings.warn(
            f"attention runs on the portable path, which is slow on a GPU, because: {reasons}. "
            "explain() gives this reason too; strict=True raises instead.",
            stacklevel=5,
        )


_warned_reasons: set[str] = set()
