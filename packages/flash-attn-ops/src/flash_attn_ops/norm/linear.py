"""A norm and the linear layer after it. The normalised rows are not kept: backward computes them again from the sum,
which costs one pass over memory and saves one activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ops.arguments import bad_argument, check_floating, check_same_device, check_shape
from flash_attn_ops.autocast import autocast_dtype
from flash_attn_ops.dispatch import runs_on_triton
from flash_attn_ops.library import apply, once_differentiable

from . import operators, reference
from .checks import check_norm
from .functions import records_gradients, sum_dtype_of


def layer_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(x, weight, bias, residual=residual) @ linear_weight.T + linear_bias``.

    Args:
        x, weight, bias, residual, eps, prenorm, residual_in_fp32: as for :func:`layer_norm`.
        linear_weight: (M, N), of the dtype of x; under autocast any, and the product has autocast's dtype.
        linear_bias: (M,), or None.

    Returns:
        (..., M), or ``(that, x + residual)`` if prenorm. Both are differentiable. On the kernel path the normalised
        rows are not stored for backward; the reference path stores what torch's autograd does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return _norm_linear(
        x, residual, weight, bias, linear_weight, linear_bias, eps, prenorm, residual_in_fp32, False
    )


def rms_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm(x, weight, bias, residual=residual) @ linear_weight.T + linear_bias``. Arguments, results and errors
    as :func:`layer_norm_linear`."""
    return _norm_linear(
        x, residual, weight, bias, linear_weight, linear_bias, eps, prenorm, residual_in_fp32, True
    )


def _norm_linear(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    is_rms: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_norm((x, None, residual, None, None, weight, bias, None, None), eps, 0.0, False)
    dtype = _product_dtype(x, linear_weight, linear_bias)
    sum_dtype = sum_dtype_of(x, residual, residual_in_fp32)
    norm = (eps, 0.0, is_rms, False, dtype, sum_dtype)
    inputs = (x, None, residual, None, None, None, weight, bias, None, None)
    returns_sum = residual is not None or sum_dtype != x.dtype  # otherwise the sum is x
    name = "rms_norm_linear" if is_rms else "layer_norm_linear"
    if runs_on_triton(name, x, residual, weight, bias) and records_gradients(
        x, residual, weight, bias, linear_weight, linear_bias
    ):
        result, total = apply(
            *(_NormLinear, x, residual, weight, bias, linear_weight, linear_bias),
            *(eps, is_rms, dtype, sum_dtype, returns_sum),
        )
    else:
        if runs_on_triton(name, x, residual, weight, bias):
            out, _, total, _, _ = operators.forward(*inputs, *norm, returns_sum, False, None, None)
        else:
            out, _, total = reference.forward(*inputs, *norm)
        result = F.linear(out, linear_weight.to(dtype), _cast(linear_bias, dtype))
    return (result, total if returns_sum else x) if prenorm else result


def _product_dtype(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """What the linear layer computes in: autocast's dtype, or that of its tensors, which is one."""
    tensors = {"linear_weight": linear_weight, "linear_bias": linear_bias}
    check_floating(**tensors)
    check_same_device(x=x, **tensors)
    if linear_weight.dim() != 2 or linear_weight.shape[1] != x.shape[-1]:
        raise bad_argument(
            "linear_weight",
            f"shape {tuple(linear_weight.shape)}",
            f"(M, {x.shape[-1]}), columns for the last dimension of x",
            "pass the weight of an nn.Linear that takes x",
        )
    if linear_bias is not None:
        check_shape("linear_bias", linear_bias, linear_weight.shape[:1], "one for each row of linear_weight")
    dtype = autocast_dtype(x)
    if dtype is not None:
        return dtype
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise bad_argument(
                name, tensor.dtype, f"{x.dtype}, the dtype of x", "convert it, or use torch.autocast"
            )
    return x.dtype


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _NormLinear(torch.autograd.Function):
    """``(product, sum)``; the sum is None unless it differs from x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        eps: float,
        is_rms: bool,
        dtype: torch.dtype,
        sum_dtype: torch.dtype,
        returns_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out, _, total, mean, rstd = operators.forward(
            *(x, None, residual, None, None, None, weight, bias, None, None),
            *(eps, 0.0, is_rms, False, dtype, sum_dtype, returns_sum, True, None, None),
        )
        ctx.save_for_backward(
            total if returns_sum else x, weight, bias, linear_weight, None if is_rms else mean, rstd
        )
        ctx.eps, ctx.is_rms, ctx.dtype = eps, is_rms, dtype
        ctx.x_dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.linear_bias_dtype = None if linear_bias is None else linear_bias.dtype
        ctx.set_materialize_grads(False)
        return F.linear(
            out, linear_weight.to(dtype), _cast(linear_bias, dtype)
        ), total if returns_sum else None

    @staticmethod
    @once_differentiable("a norm with its linear layer")
    def backward(ctx: Any, d_product: Tensor | None, d_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, linear_weight, mean, rstd = ctx.saved_tensors
        if d_product is None:
            if d_sum is None:
                return (None,) * 11
            d_residual = None if ctx.residual_dtype is None else d_sum.to(ctx.residual_dtype)
            return (d_sum.to(ctx.x_dtype), d_residual, *(None,) * 9)
        *needs_norm, needs_linear_weight, needs_linear_bias = ctx.needs_input_grad[:6]
        d_rows = d_product.reshape(rstd.shape[0], d_product.shape[-1]).to(ctx.dtype)
        d_linear_weight = d_linear_bias = None
        if needs_linear_weight:
            out, _, _, _, _ = operators.forward(
                *(total, None, None, None, None, None, weight, bias, None, None),
                *(ctx.eps, 0.0, ctx.is_rms, False, ctx.dtype, total.dtype, False, False, None, None),
            )
            d_linear_weight = (d_rows.t() @ out.view(-1, out.shape[-1])).to(linear_weight.dtype)
        if needs_linear_bias:
            d_linear_bias = d_rows.sum(0).to(ctx.linear_bias_dtype)
        if not any(needs_norm):
            return *(None,) * 4, d_linear_weight, d_linear_bias, *(None,) * 5
        d_out = (d_rows @ linear_weight.to(ctx.dtype)).view(total.shape)
        second_dtype = ctx.residual_dtype if ctx.residual_dtype != ctx.x_dtype else None
        dx, _, second, dw, db, _, _, _ = operators.backward(
            *(d_out, None, d_sum, total, None, None, None, None, weight, None, mean, rstd),
            *(0.0, ctx.is_rms, False, ctx.x_dtype, None, second_dtype),
            *(None if bias is None else bias.dtype, None),
        )
        d_residual = dx if second_dtype is None else second
        return (
            *(dx, None if ctx.residual_dtype is None else d_residual),
            *(dw, None if bias is None else db, d_linear_weight, d_linear_bias),
            *(None,) * 5,
        )
