"""The launchers of the norm kernels as operators: any shape (..., N) and strides in, contiguous results out."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from flash_attn_ops.launch import empty_like
from flash_attn_ops.library import kernels_of, opaque

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
Gradients = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


_kernels = kernels_of(__package__)


def _forward_fake(
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
    store_sum: bool,
    store_statistics: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    num_rows = x.numel() // x.shape[-1]
    return (
        empty_like(x, out_dtype) if out is None else None,
        empty_like(x, out_dtype) if weight1 is not None else None,
        empty_like(x, sum_dtype) if store_sum and residual_out is None else None,
        x.new_empty(num_rows, dtype=torch.float32) if store_statistics and not is_rms else None,
        x.new_empty(num_rows, dtype=torch.float32) if store_statistics else None,
    )


@opaque(
    "norm_forward(Tensor x, Tensor? x1, Tensor? residual, Tensor? rowscale, Tensor? layerscale, Tensor? seed, "
    "Tensor weight, Tensor? bias, Tensor? weight1, Tensor? bias1, float eps, float dropout_p, bool is_rms, "
    "bool zero_centered, ScalarType out_dtype, ScalarType sum_dtype, bool store_sum, bool store_statistics, "
    "Tensor(a!)? out, Tensor(b!)? residual_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
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
    store_sum: bool,
    store_statistics: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, out1, sum, mean, rstd)``: outputs and sum in the shape of x, the statistics float32 with one value a
    row. ``out`` and ``residual_out`` (contiguous) are written where they are given, and None in the result."""
    written = empty_like(x, out_dtype) if out is None else out
    out1 = None if weight1 is None else empty_like(x, out_dtype)
    total = empty_like(x, sum_dtype) if store_sum and residual_out is None else None
    written_sum = total if residual_out is None else residual_out
    mean, rstd = _kernels().forward(
        x,
        x1,
        residual,
        _dense(rowscale),
        _dense(layerscale),
        seed,
        weight.contiguous(),
        _dense(bias),
        _dense(weight1),
        _dense(bias1),
        written,
        out1,
        written_sum,
        eps,
        dropout_p,
        is_rms,
        zero_centered,
        sum_dtype,
        store_statistics,
    )
    return written if out is None else None, out1, total, mean, rstd


def _backward_fake(
    d_out: Tensor,
    d_out1: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    weight1: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
    x_dtype: torch.dtype,
    x1_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    bias1_dtype: torch.dtype | None,
) -> Gradients:
    def like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else empty_like(tensor, dtype)

    return (
        empty_like(total, x_dtype),
        *(like(total, x1_dtype), like(total, residual_dtype)),
        empty_like(weight),
        like(weight, bias_dtype),
        None if weight1 is None else empty_like(weight1),
        like(weight, bias1_dtype),
        None if x is None or layerscale is None else empty_like(layerscale),
    )


@opaque(
    "norm_backward(Tensor d_out, Tensor? d_out1, Tensor? d_sum, Tensor total, Tensor? x, Tensor? rowscale, "
    "Tensor? layerscale, Tensor? seed, Tensor weight, Tensor? weight1, Tensor? mean, Tensor rstd, float dropout_p, "
    "bool is_rms, bool zero_centered, ScalarType x_dtype, ScalarType? x1_dtype, ScalarType? residual_dtype, "
    "ScalarType? bias_dtype, ScalarType? bias1_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def backward(
    d_out: Tensor,
    d_out1: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    weight1: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
    x_dtype: torch.dtype,
    x1_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    bias1_dtype: torch.dtype | None,
) -> Gradients:
    """``(dx, dx1, d_residual, dw, db, dw1, db1, d_layerscale)``: dx1, d_residual and the biases' if they are given a
    dtype, dw1 with ``weight1``, d_layerscale with ``x``.

    ``total`` is what was normalised, ``d_sum`` the gradient of the returned sum; ``weight1`` comes with ``d_out1``.
    """
    dx, dx1, d_residual, dw, db, dw1, db1, d_layerscale = _backward_fake(
        *(d_out, d_out1, d_sum, total, x, rowscale, layerscale, seed, weight, weight1, mean, rstd),
        *(dropout_p, is_rms, zero_centered, x_dtype, x1_dtype, residual_dtype, bias_dtype, bias1_dtype),
    )
    _kernels().backward(
        d_out,
        d_out1,
        d_sum,
        total,
        x,
        _dense(rowscale),
        _dense(layerscale),
        seed,
        weight.contiguous(),
        _dense(weight1),
        mean,
        rstd,
        dx,
        dx1,
        d_residual,
        (dw, db, dw1, db1, d_layerscale),
        dropout_p,
        is_rms,
        zero_centered,
    )
    return dx, dx1, d_residual, dw, db, dw1, db1, d_layerscale


def _mask_fake(seed: Tensor, x: Tensor, dropout_p: float, branch: int) -> Tensor:
    return empty_like(x, torch.bool)


@opaque("norm_dropout_mask(Tensor seed, Tensor x, float dropout_p, int branch) -> Tensor", _mask_fake)
def dropout_mask(seed: Tensor, x: Tensor, dropout_p: float, branch: int) -> Tensor:
    """Which elements of x (..., N) stay: bool. Of x only the shape counts."""
    mask = empty_like(x, torch.bool)
    _kernels().dropout_mask(seed, mask, dropout_p, branch)
    return mask


def _dense(tensor: MaybeTensor) -> MaybeTensor:
    return tensor if tensor is None else tensor.contiguous()
