"""LayerNorm and RMSNorm, optionally with the residual addition that precedes them, in one pass over memory.

For every row of N values, with r = x + residual (r = x without residual) in the dtype it is returned in:

    layer_norm:  out = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
    rms_norm:    out = r / sqrt(mean(r^2) + eps) * weight + bias

[LayerNorm: Ba et al. 2016, arXiv:1607.06450; RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.] Statistics
and gradients of weights are accumulated in float32. Autocast changes nothing: the arithmetic is float32
whatever the inputs, and the output has x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flash_attn_ops.arguments import bad_argument, check_floating, check_same_device, check_shape
from flash_attn_ops.dispatch import runs_on_triton

from . import operators, reference

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "rms_norm"]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of ``x + residual``.

    Args:
        x: (..., N), any floating-point dtype and strides.
        weight: (N,), any floating-point dtype.
        bias: (N,), or None for no shift.
        residual: (..., N) like x, in its own dtype, added to x before normalising. None adds nothing.
        eps: added to the variance.
        prenorm: also return the sum, which is the residual stream of a pre-norm transformer block.
        residual_in_fp32: keep the sum (returned, and stored for backward) in float32. Otherwise it has the
            dtype of residual, or of x without one.

    Returns:
        out (..., N) in x's dtype, or ``(out, residual_out)`` if prenorm. Both are differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms=False)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of ``x + residual``. Arguments, results and errors as
    :func:`layer_norm`."""
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms=True)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    *,
    is_rms: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check(x, weight, bias, residual, eps)
    residual_dtype = x.dtype if residual is None else residual.dtype
    if residual_in_fp32:
        residual_dtype = torch.promote_types(residual_dtype, torch.float32)
    if not runs_on_triton("rms_norm" if is_rms else "layer_norm", x, residual, weight, bias):
        normalise = reference.rms_norm if is_rms else reference.layer_norm
        outputs = normalise(x, weight, bias, residual, eps, residual_dtype)
        return outputs if prenorm else outputs[0]

    returns_sum = prenorm and (residual is not None or residual_dtype != x.dtype)  # otherwise the sum is x
    inputs = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        out, total = _Norm.apply(*inputs, eps, is_rms, residual_dtype, returns_sum)
    else:
        out, total, _, _ = operators.forward(*inputs, eps, is_rms, residual_dtype, returns_sum, False)
    if prenorm:
        return out, total if returns_sum else x
    return out


class _Norm(torch.autograd.Function):
    """The kernels under autograd. With a residual the sum is stored for backward, returned or not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        is_rms: bool,
        residual_dtype: torch.dtype,
        returns_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stores_sum = returns_sum or residual is not None
        out, total, mean, rstd = operators.forward(
            x, weight, bias, residual, eps, is_rms, residual_dtype, stores_sum, True
        )
        ctx.save_for_backward(total if stores_sum else x, weight, mean, rstd)
        ctx.x_dtype, ctx.is_rms = x.dtype, is_rms
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return out, total if returns_sum else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:  # only the returned sum was used
            if d_sum is None:
                return (None,) * 8
            d_residual = None if ctx.residual_dtype is None else d_sum.to(ctx.residual_dtype)
            return d_sum.to(ctx.x_dtype), None, None, d_residual, None, None, None, None
        total, weight, mean, rstd = ctx.saved_tensors
        second_dtype = ctx.residual_dtype if ctx.residual_dtype != ctx.x_dtype else None  # besides dx's
        dx, second, dw, db = operators.backward(
            *(d_out, d_sum, total, weight, mean, rstd),
            *(ctx.is_rms, ctx.x_dtype, second_dtype, ctx.bias_dtype),
        )
        d_residual = dx if second_dtype is None else second
        return (
            *(
                dx,
                dw,
                None if ctx.bias_dtype is None else db,
                None if ctx.residual_dtype is None else d_residual,
            ),
            *(None, None, None, None),
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> None:
    check_floating(x=x, weight=weight, bias=bias, residual=residual)
    check_same_device(x=x, weight=weight, bias=bias, residual=residual)
    if x.dim() == 0:
        raise bad_argument("x", "a scalar", "at least one dimension, (..., N)", "normalise over a dimension")
    check_shape("weight", weight, x.shape[-1:], "the last dimension of x")
    if bias is not None:
        check_shape("bias", bias, x.shape[-1:], "the last dimension of x")
    if residual is not None:
        check_shape("residual", residual, x.shape, "the shape of x")
    if not eps >= 0:
        raise bad_argument("eps", eps, "a number >= 0", "use the default, 1e-5")


class _NormModule(nn.Module):
    """What both modules share: a weight, perhaps a bias, eps."""

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if hidden_size < 0:
            raise bad_argument(
                "hidden_size", hidden_size, "a size >= 0", "pass the last dimension of the input"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        shift = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, bias={self.bias is not None}"


class LayerNorm(_NormModule):
    """:func:`layer_norm` with its weight (ones) and bias (zeros; ``bias=False`` leaves it out)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, bias, device, dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class RMSNorm(_NormModule):
    """:func:`rms_norm` with its weight (ones)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, False, device, dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(
            x,
            self.weight,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
