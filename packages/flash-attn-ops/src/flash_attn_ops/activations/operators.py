"""The launchers of the activation kernels as operators: any shape (..., N) and strides in, contiguous results out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_attn_ops.library import kernels_of, opaque

_kernels = kernels_of(__package__)


@opaque(
    "activation_forward(Tensor x, Tensor? bias, Tensor? value, str activation) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)
def forward(x: Tensor, bias: Tensor | None, value: Tensor | None, activation: str) -> Tensor:
    """``activation(x + bias) * value`` in the dtype of x."""
    bias = None if bias is None else bias.contiguous()
    out = _kernels().forward(_rows(x), bias, None if value is None else _rows(value), activation)
    return out if x.dim() == 2 else out.view(x.shape)


def _backward_fake(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    value: Tensor | None,
    activation: str,
    order: str | None,
    bias_dtype: torch.dtype | None,
    with_out: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    *leading, size = x.shape
    width = 2 * size if order is not None else size
    return (
        x.new_empty((*leading, width)),
        None if value is None or order is not None else x.new_empty(x.shape),
        None if bias_dtype is None else x.new_empty(width, dtype=bias_dtype),
        x.new_empty(x.shape) if with_out else None,
    )


@opaque(
    "activation_backward(Tensor d_out, Tensor x, Tensor? bias, Tensor? value, str activation, str? order, "
    "ScalarType? bias_dtype, bool with_out) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def backward(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    value: Tensor | None,
    activation: str,
    order: str | None,
    bias_dtype: torch.dtype | None,
    with_out: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(d_x, d_value, d_bias, out)`` of ``out = activation(x + bias) * value``, for the gradient d_out of out.

    With an ``order``, x and value are the halves of one tensor, and d_x (..., 2N) holds both gradients in that order;
    d_value is then None. ``bias_dtype`` asks for d_bias, the sums of d_x over rows, (N,) or (2N,), whether or not
    there is a bias; ``with_out`` for the activation.
    """
    bias = None if bias is None else bias.contiguous()
    value_rows = None if value is None else _rows(value)
    d_x, d_value, d_bias, out = _kernels().backward(
        _rows(d_out), _rows(x), bias, value_rows, activation, order, bias_dtype, with_out
    )
    if x.dim() == 2:
        return d_x, d_value, d_bias, out
    return (
        d_x.view(*x.shape[:-1], d_x.shape[-1]),
        None if d_value is None else d_value.view(x.shape),
        d_bias,
        None if out is None else out.view(x.shape),
    )


def _rows(tensor: Tensor) -> Tensor:
    """(rows, N) with neighbouring values in a row; a view unless the strides forbid it."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
