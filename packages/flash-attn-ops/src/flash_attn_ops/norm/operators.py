"""The launchers of the norm kernels as operators: any shape (..., N) and strides in, contiguous results out."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_ops.library import opaque


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    is_rms: bool,
    sum_dtype: torch.dtype,
    store_sum: bool,
    store_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    num_rows = x.numel() // x.shape[-1]
    total = x.new_empty(x.shape, dtype=sum_dtype) if store_sum else None
    mean = x.new_empty(num_rows, dtype=torch.float32) if store_statistics and not is_rms else None
    rstd = x.new_empty(num_rows, dtype=torch.float32) if store_statistics else None
    return x.new_empty(x.shape), total, mean, rstd


@opaque(
    "norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool is_rms, "
    "ScalarType sum_dtype, bool store_sum, bool store_statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    is_rms: bool,
    sum_dtype: torch.dtype,
    store_sum: bool,
    store_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, sum, mean, rstd)``, out and sum in the shape of x, the statistics float32 with one value a row."""
    from . import triton_kernels

    out, total, mean, rstd = triton_kernels.forward(
        _rows(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else _rows(residual),
        eps,
        is_rms=is_rms,
        sum_dtype=sum_dtype,
        store_sum=store_sum,
        store_statistics=store_statistics,
    )
    return out.view(x.shape), None if total is None else total.view(x.shape), mean, rstd


def _backward_fake(
    d_out: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    is_rms: bool,
    x_dtype: torch.dtype,
    second_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    second = None if second_dtype is None else total.new_empty(total.shape, dtype=second_dtype)
    db = None if bias_dtype is None else weight.new_empty(weight.shape, dtype=bias_dtype)
    return total.new_empty(total.shape, dtype=x_dtype), second, weight.new_empty(weight.shape), db


@opaque(
    "norm_backward(Tensor d_out, Tensor? d_sum, Tensor total, Tensor weight, Tensor? mean, Tensor rstd, "
    "bool is_rms, ScalarType x_dtype, ScalarType? second_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def backward(
    d_out: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    is_rms: bool,
    x_dtype: torch.dtype,
    second_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``(dx, dx in second_dtype, dw, db)``; ``total`` is what was normalised, ``d_sum`` the gradient of the
    returned sum."""
    from . import triton_kernels

    dx, second, dw, db = triton_kernels.backward(
        _rows(d_out),
        None if d_sum is None else _rows(d_sum),
        _rows(total),
        weight.contiguous(),
        mean,
        rstd,
        is_rms=is_rms,
        x_dtype=x_dtype,
        second_dtype=second_dtype,
        bias_dtype=bias_dtype,
    )
    return dx.view(total.shape), None if second is None else second.view(total.shape), dw, db


def _rows(tensor: Tensor) -> Tensor:
    """(rows, N) with neighbouring values in a row; a view unless the strides forbid it."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
