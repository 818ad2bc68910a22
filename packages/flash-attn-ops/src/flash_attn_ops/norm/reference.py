"""LayerNorm and RMSNorm in plain torch operations: the definition, and what runs where the kernels do not.

Arithmetic is float32, or float64 if an input is; only the sum and the outputs are rounded to their dtypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import keep_mask, keep_scale


def forward(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
    out_dtype: torch.dtype,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(out, out1, sum)``: the sum in ``sum_dtype``, its norm scaled and shifted once, or twice if there is a
    ``weight1``, in ``out_dtype``. ``seed`` is (seed, offset) of the dropout, None without."""
    dtype = torch.float32
    for tensor in (x, x1, residual):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    total = x.to(dtype)
    if rowscale is not None:
        total = total * rowscale.to(dtype).unsqueeze(-1)
    if layerscale is not None:
        total = total * layerscale.to(dtype)
    total = _dropped(total, seed, dropout_p, 0)
    if x1 is not None:
        total = total + _dropped(x1.to(dtype), seed, dropout_p, 1)
    if residual is not None:
        total = total + residual.to(dtype)
    total = total.to(sum_dtype)

    exact = total.to(dtype)
    if is_rms:
        scale, shift = _affine(weight, bias, zero_centered, dtype)
        x_hat = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        out = x_hat * scale if shift is None else x_hat * scale + shift
    else:
        out = F.layer_norm(exact, exact.shape[-1:], *_affine(weight, bias, zero_centered, dtype), eps)
        x_hat = exact if weight1 is None else F.layer_norm(exact, exact.shape[-1:], eps=eps)
    out1 = None
    if weight1 is not None:
        scale, shift = _affine(weight1, bias1, zero_centered, dtype)
        out1 = x_hat * scale if shift is None else x_hat * scale + shift
        out1 = out1.to(out_dtype)
    return out.to(out_dtype), out1, total


def _dropped(x: Tensor, seed: Tensor | None, dropout_p: float, branch: int) -> Tensor:
    if seed is None:
        return x
    return torch.where(keep_mask(seed, x.shape, dropout_p, branch), x * keep_scale(dropout_p), 0.0)


def _affine(
    weight: Tensor, bias: Tensor | None, zero_centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    scale = weight.to(dtype) + 1 if zero_centered else weight.to(dtype)
    return scale, None if bias is None else bias.to(dtype)
