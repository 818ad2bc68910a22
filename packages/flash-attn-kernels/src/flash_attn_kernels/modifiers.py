"""Score modifiers of a public call: checked, and viewed in the shapes that every path takes.

The views are made where autograd sees them, so gradients come back in the caller's shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import DTYPES, check_device, transposed_layout_hint
from .errors import bad_argument
from .inputs import PackedLayout, ScoreModifiers

_BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DIMENSIONS = ("batch", "heads", "seqlen_q", "seqlen_k")


def make_modifiers(
    q: Tensor,
    k: Tensor,
    packed: PackedLayout | None,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
) -> ScoreModifiers:
    """Check the modifiers against q and k, which are checked already, and give them their full rank without a copy.

    Raises:
        ValueError: for a shape that does not broadcast, a wrong dtype or device, or a bias and a mask mixed up.
    """
    heads = q.shape[-2]
    batch = q.shape[0] if packed is None else packed.cu_seqlens_q.shape[0] - 1
    if attn_bias is not None:
        _check_bias_dtype(attn_bias, q)
        attn_bias = _four_dimensional("attn_bias", attn_bias, q, k, packed, batch)
    if attn_mask is not None:
        _check_is_bool("attn_mask", attn_mask, "visible", "pass an additive float mask as attn_bias")
        attn_mask = _four_dimensional("attn_mask", attn_mask, q, k, packed, batch)
    if key_padding_mask is not None:
        _check_is_bool("key_padding_mask", key_padding_mask, "a real key", "key_padding_mask.bool()")
        _check_key_padding_shape(key_padding_mask, k, packed, batch)
        check_device("key_padding_mask", key_padding_mask, q)
    if alibi_slopes is not None:
        _check_per_head(
            "alibi_slopes", alibi_slopes, q, ((heads,), (batch, heads)), "pass one slope per head"
        )
        if alibi_slopes.dim() == 1:
            alibi_slopes = alibi_slopes.unsqueeze(0)
    if learnable_sink is not None:
        _check_per_head("learnable_sink", learnable_sink, q, ((heads,),), "pass one logit per head")
    return ScoreModifiers(attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink)


def score_tensors(modifiers: ScoreModifiers) -> tuple[str, ...]:
    """Names of those that change single scores: all but the sink, which is one more logit of a row."""
    return tuple(
        name
        for name, x in zip(modifiers._fields, modifiers, strict=True)
        if x is not None and name != "learnable_sink"
    )


def is_broadcast(attn_bias: Tensor, q: Tensor, k: Tensor, packed: PackedLayout | None) -> bool:
    """Whether one element of the bias (in its full rank) is added to several scores."""
    batch, seqlen_q, seqlen_k = _extents(q, k, packed)
    return any(
        size == 1 and extent != 1
        for size, extent in zip(attn_bias.shape, (batch, q.shape[-2], seqlen_q, seqlen_k), strict=True)
    )


def _extents(q: Tensor, k: Tensor, packed: PackedLayout | None) -> tuple[int, int, int]:
    """Sequences, and the lengths that none of them exceeds."""
    if packed is None:
        return q.shape[0], q.shape[1], k.shape[1]
    keys = k.shape[0] if packed.block_table is None else packed.block_table.shape[1] * k.shape[1]
    return packed.cu_seqlens_q.shape[0] - 1, q.shape[0], keys


def _check_is_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise bad_argument(name, type(x).__name__, "a torch.Tensor", "convert it with torch.as_tensor")


def _check_bias_dtype(attn_bias: Tensor, q: Tensor) -> None:
    _check_is_tensor("attn_bias", attn_bias)
    if attn_bias.dtype == torch.bool:
        raise bad_argument(
            "attn_bias", "dtype torch.bool", "a floating-point dtype", "pass a bool mask as attn_mask"
        )
    if attn_bias.dtype not in _BIAS_DTYPES and not (q.dtype == attn_bias.dtype == torch.float64):
        raise bad_argument(
            "attn_bias",
            f"dtype {attn_bias.dtype}",
            "float16, bfloat16 or float32 (float64 with float64 inputs)",
            "attn_bias.float()",
        )


def _check_is_bool(name: str, mask: Tensor, true_means: str, fix: str) -> None:
    _check_is_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise bad_argument(name, f"dtype {mask.dtype}", f"torch.bool, where True is {true_means}", fix)


def _four_dimensional(
    name: str, x: Tensor, q: Tensor, k: Tensor, packed: PackedLayout | None, batch: int
) -> Tensor:
    """View of ``x`` with leading dimensions of 1, after checking that it broadcasts to the scores.

    In packed calls rows and columns are positions inside a sequence: any number of them is accepted.
    """
    heads = q.shape[-2]
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if packed is None:
        fits = fits and shape[2] in (1, q.shape[1]) and shape[3] in (1, k.shape[1])
    if not fits:
        extents = [
            str(batch),
            str(heads),
            *(map(str, (q.shape[1], k.shape[1])) if packed is None else ("any", "any")),
        ]
        expected = ", ".join(
            f"{d} {n} or 1" if n != "any" else f"any {d}" for d, n in zip(_DIMENSIONS, extents, strict=True)
        )
        fix = f"give {name} dimensions that broadcast"
        if packed is None and shape[1:] == (q.shape[1], q.shape[2], k.shape[2]):
            fix += f"; to fit it, {transposed_layout_hint()}"
        raise bad_argument(name, f"shape {tuple(x.shape)}", f"a shape that broadcasts to ({expected})", fix)
    check_device(name, x, q)
    return x if x.dim() == 4 else x.view(shape)


def _check_key_padding_shape(mask: Tensor, k: Tensor, packed: PackedLayout | None, batch: int) -> None:
    fits = mask.dim() == 2 and mask.shape[0] == batch and (packed is not None or mask.shape[1] == k.shape[1])
    if not fits:
        expected = f"({batch}, {k.shape[1]})" if packed is None else f"({batch}, positions in a sequence)"
        raise bad_argument(
            "key_padding_mask",
            f"shape {tuple(mask.shape)}",
            expected,
            "pass one row per sequence, one entry per key",
        )


def _check_per_head(name: str, x: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...], fix: str) -> None:
    _check_is_tensor(name, x)
    if x.shape not in shapes:
        raise bad_argument(name, f"shape {tuple(x.shape)}", " or ".join(map(str, shapes)), fix)
    if x.dtype not in DTYPES:
        raise bad_argument(name, f"dtype {x.dtype}", "a floating-point dtype", f"{name}.float()")
    check_device(name, x, q)
