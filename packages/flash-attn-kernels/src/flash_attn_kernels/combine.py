"""Attention over a cache from the partial results of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .blockwise_scores import compute_dtype
from .checks import DTYPES
from .errors import bad_argument
from .merge import merge_attention_states


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Combine attentions of the same queries over disjoint parts of the keys, stacked: the second step of split-KV.

    :func:`merge_attention_states` for partial results that may never have been written: a part whose lse is -inf is
    ignored, whatever its out holds. Differentiable.

    Args:
        out_partial: (splits, B, S, H, Dv) or (splits, T, H, Dv), each part normalised by its own softmax; float32 (or
            float16, bfloat16, float64).
        lse_partial: (splits, B, H, S) or (splits, H, T), natural logarithm; -inf where a part has no visible key.
            float32, or float64 with float64 parts.
        out_dtype: of the result; None is that of ``out_partial``.

    Returns:
        out (B, S, H, Dv) or (T, H, Dv), and lse (B, H, S) or (H, T), computed in fp32 (fp64 for fp64). Rows that no
        part saw get 0 and -inf.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.

    Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.
    """
    _check(out_partial, lse_partial, out_dtype)
    # Masked, not only weighted by 0: 0 * NaN is NaN.
    nothing = (lse_partial == float("-inf")).transpose(-1, -2).unsqueeze(-1)
    parts = out_partial.to(compute_dtype(out_partial.dtype)).masked_fill(nothing, 0.0)
    out, lse = merge_attention_states(parts, lse_partial)
    return out.to(out_partial.dtype if out_dtype is None else out_dtype), lse


def _check(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> None:
    for name, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(x, Tensor):
            raise bad_argument(name, type(x).__name__, "a torch.Tensor", "stack the parts with torch.stack")
    if out_partial.dim() not in (4, 5) or out_partial.shape[0] == 0:
        raise bad_argument(
            "out_partial",
            f"shape {tuple(out_partial.shape)}",
            "(splits, batch, seqlen, heads, head_dim) or (splits, tokens, heads, head_dim), with at least 1 split",
            "stack the parts in the first dimension",
        )
    *leading, seqlen, heads, _ = out_partial.shape
    if lse_partial.shape != (*leading, heads, seqlen):
        raise bad_argument(
            "lse_partial",
            f"shape {tuple(lse_partial.shape)}",
            f"shape {(*leading, heads, seqlen)}",
            "pass lse as attention returns it, heads before queries",
        )
    if out_partial.dtype not in DTYPES:
        raise bad_argument(
            "out_partial", f"dtype {out_partial.dtype}", "a floating-point dtype", "out_partial.float()"
        )
    expected = compute_dtype(out_partial.dtype)
    if lse_partial.dtype != expected:
        raise bad_argument(
            "lse_partial", f"dtype {lse_partial.dtype}", str(expected), f"cast it to {expected}"
        )
    if lse_partial.device != out_partial.device:
        raise bad_argument(
            "lse_partial",
            f"device {lse_partial.device}",
            f"the device of out_partial, {out_partial.device}",
            "move it with .to",
        )
    if out_dtype is not None and out_dtype not in DTYPES:
        raise bad_argument("out_dtype", out_dtype, "a floating-point dtype", "leave it None")
