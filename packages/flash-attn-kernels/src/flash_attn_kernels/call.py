"""What every public attention function does with its arguments: check, choose a path, run it.

A call on tiny tensors costs little more than the Python it passes through, so what only depends on options, dtypes
and head dims is worked out once (``_cached_plan``), and tensors that are absent cost nothing. Calls without packed
layout and modifiers are not even checked again where one that agrees with them has passed (``_plans_of_plain_calls``).
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import autograd, checks, library, modifiers, portable
from .autocast import autocast_is_on, autocast_switched_off, to_autocast_dtype
from .dispatch import AttentionProblem, Explanation, choose_path
from .forward_mode import has_tangent
from .inputs import NO_MODIFIERS, AttentionInputs, PackedLayout, ScoreModifiers
from .options import AttentionOptions, as_number, as_window, make_options
from .philox import draw_seed_and_offset
from .tracing import constant_under_compile

# The arguments of the public functions in two groups, since every one that is passed on alone costs time: what is no
# tensor and matters for the plan, and the tensors that change the scores.
OptionArguments = tuple[float, float | None, bool, tuple[int, int], float, bool, str]
"""dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment."""
ModifierArguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink."""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLayout | None,
    option_arguments: OptionArguments,
    modifier_arguments: ModifierArguments,
    return_attn_probs: bool,
    return_lse: bool,
    strict: bool,
    heads: Tensor | None = None,
) -> Any:
    """out, (out, lse) or (out, lse, probabilities), as the public functions describe them.

    ``heads`` (..., H + 2 Hk, D): what q, k and v are views of, if they follow each other in one tensor.
    """
    if heads is not None and autocast_is_on(heads):
        heads = to_autocast_dtype(heads, heads.device.type)
        q, k, v = autograd.split_heads(heads, q.shape[-2])
    q, k, v, autocast, score_modifiers, needs_gradient, options, explanation = prepare(
        q, k, v, packed, option_arguments, modifier_arguments
    )
    path = explanation.path
    if path == "portable":
        object_to_the_portable_path(explanation.reasons["sm80"], q.device.type, strict)
    seed_and_offset = draw_seed_and_offset(q.device) if options.dropout_p > 0 else None
    attend = autograd.attend_without_autocast if autocast else autograd.attend
    out, lse = attend(
        q,
        k,
        v,
        options,
        score_modifiers,
        seed_and_offset,
        packed,
        path,
        needs_gradient,
        return_lse or return_attn_probs,
        heads,
    )
    if return_attn_probs:
        assert lse is not None  # since it was asked for
        inputs = AttentionInputs(q, k, v, options, score_modifiers, seed_and_offset, packed)
        with torch.no_grad(), autocast_switched_off(q) if autocast else nullcontext():
            return out, lse, portable.probabilities(inputs, lse)
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLayout | None,
    option_arguments: OptionArguments,
    modifier_arguments: ModifierArguments,
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
    dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment = option_arguments
    attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink = modifier_arguments
    if (
        packed is not None
        or attn_bias is not None
        or attn_mask is not None
        or key_padding_mask is not None
        or alibi_slopes is not None
        or learnable_sink is not None
        or is_compiling()
        or not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor))
    ):
        checked = _check_and_plan(q, k, v, packed, option_arguments, modifier_arguments)
        return q, k, v, autocast, *checked
    # A plain call. Its key has all that checks and plan depend on.
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        key = (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            None if softmax_scale is None else float(softmax_scale),
            causal,
            window_size,
            float(softcap),
            float(dropout_p),
            deterministic or torch.are_deterministic_algorithms_enabled(),
            causal_alignment,
            needs_gradient,
            has_tangent(q, k, v),
        )
        options, explanation = _plans_of_plain_calls[key]
    except KeyError:
        if len(_plans_of_plain_calls) >= _PLANS_KEPT:
            _plans_of_plain_calls.clear()
        _, _, options, explanation = _check_and_plan(q, k, v, None, option_arguments, modifier_arguments)
        _plans_of_plain_calls[key] = options, explanation
    except (TypeError, ValueError, OverflowError):
        # A list as the window, or symbolic sizes, cannot be hashed; and what is no number is refused there.
        _, _, options, explanation = _check_and_plan(q, k, v, None, option_arguments, modifier_arguments)
    return q, k, v, autocast, NO_MODIFIERS, needs_gradient, options, explanation


def _check_and_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedLayout | None,
    option_arguments: OptionArguments,
    modifier_arguments: ModifierArguments,
) -> tuple[ScoreModifiers, bool, AttentionOptions, Explanation]:
    """The last four results of :func:`prepare`, for q, k and v as the path gets them."""
    dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment = option_arguments
    attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink = modifier_arguments
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
    # Of a list, to be hashable.
    window: Any = window_size if type(window_size) is tuple else as_window(window_size)
    plan = _plan if is_compiling() else _cached_plan
    options, explanation = plan(
        q.device,
        q.dtype,
        head_dim,
        head_dim_v,
        layout,
        None if softmax_scale is None else as_number("softmax_scale", softmax_scale),
        causal,
        window,
        as_number("softcap", softcap),
        as_number("dropout_p", dropout_p),
        deterministic,
        causal_alignment,
        needs_gradient,
        not is_compiling() and has_tangent(q, k, v, *score_modifiers),
        sums_broadcast_bias,
        score_tensors,
    )
    return score_modifiers, needs_gradient, options, explanation


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
    has_tangent: bool,
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
        compute_capability=compute_capability(device.index) if device.type == "cuda" else None,
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        layout=layout,
        softmax_scale=options.softmax_scale,
        has_softcap=options.softcap > 0.0,
        has_dropout=options.dropout_p > 0.0,
        score_tensors=score_tensors,
        deterministic=options.deterministic,
        needs_gradient=needs_gradient,
        has_tangent=has_tangent,
        sums_broadcast_bias=sums_broadcast_bias,
        library_error=library.load_error() if device.type == "cuda" else None,
    )
    return options, choose_path(problem)


# Bounded, since scales and windows may be computed anew for every call.
_PLANS_KEPT = 1024
_cached_plan = functools.lru_cache(maxsize=_PLANS_KEPT)(_plan)
# Of calls without a packed layout and without modifiers: they are checked once for all calls that agree in shapes,
# dtypes, devices and options, as the layers of a model do.
_plans_of_plain_calls: dict[Any, tuple[AttentionOptions, Explanation]] = {}


def object_to_the_portable_path(
    reasons: tuple[str, ...], device_type: str, strict: bool, *, stacklevel: int = 5
) -> None:
    """Raise if ``strict``; on a GPU warn, at the line ``stacklevel`` frames up from where the warning is given."""
    text = "; ".join(reasons)
    if strict:
        raise ValueError(
            f"strict: got a call that no compiled kernel can run ({text}); expected one it can. "
            "Fix: change what the reasons name, or pass strict=False for the portable path."
        )
    if device_type == "cuda":
        _warn_once(text, stacklevel)


# torch.compile asks these once, while tracing, and treats the answers as constants.


@constant_under_compile
def compute_capability(device_index: int | None) -> tuple[int, int] | None:
    """None where there is no such device to ask, as under FakeTensor on a machine without a GPU."""
    return torch.cuda.get_device_capability(device_index) if torch.cuda.is_available() else None


@constant_under_compile
def _warn_once(reasons: str, stacklevel: int) -> None:
    if reasons not in _warned_reasons:
        _warned_reasons.add(reasons)
        warnings.warn(
            f"attention runs on the portable path, which is slow on a GPU, because: {reasons}. "
            "explain() gives this reason too; strict=True raises instead.",
            stacklevel=stacklevel,
        )


_warned_reasons: set[str] = set()
