"""LayerNorm and RMSNorm in plain torch operations: the definition, and what runs where the kernels do not.

Arithmetic is float32, or float64 if an input is; only the sum and the output are rounded to their dtypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(out, residual_out)``: the sum ``x + residual`` in ``residual_dtype``, and its LayerNorm in x's
    dtype."""
    total = _sum(x, residual, residual_dtype)
    exact = total.to(_compute_dtype(x, residual))
    shift = None if bias is None else bias.to(exact.dtype)
    out = F.layer_norm(exact, exact.shape[-1:], weight.to(exact.dtype), shift, eps)
    return out.to(x.dtype), total


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(out, residual_out)``: the sum ``x + residual`` in ``residual_dtype``, and its RMSNorm in x's
    dtype."""
    total = _sum(x, residual, residual_dtype)
    exact = total.to(_compute_dtype(x, residual))
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    out = exact * rstd * weight.to(exact.dtype)
    if bias is not None:
        out = out + bias.to(exact.dtype)
    return out.to(x.dtype), total


def _sum(x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype) -> Tensor:
    if residual is None:
        return x.to(residual_dtype)
    compute_dtype = _compute_dtype(x, residual)
    return (x.to(compute_dtype) + residual.to(compute_dtype)).to(residual_dtype)


def _compute_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)
