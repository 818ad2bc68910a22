"""The public norm functions: arguments checked, path chosen, results in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument
from flash_attn_ops.dispatch import once_for_like_calls, runs_on_triton
from flash_attn_ops.library import apply, tell_autograd

from . import operators, reference
from .autograd import Norm
from .checks import check_norm, check_written
from .dropout import draw_seed_and_offset, keep_mask


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Any, ...]:
    """LayerNorm over the last dimension of a sum, which it computes too:

        r = dropout(x * rowscale * layerscale) + dropout(x1) + residual, rounded to its dtype
        out = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias

    Args:
        x: (..., N), any floating-point dtype and strides.
        weight: (N,), any floating-point dtype.
        bias: (N,), or None for no shift.
        residual: (..., N) like x, in its own dtype. None adds nothing.
        eps: added to the variance.
        prenorm: also return r, which is the residual stream of a pre-norm transformer block.
        residual_in_fp32: keep r (returned, and stored for backward) in float32. Otherwise it has the dtype of
            residual, or of x without one.
        x1: (..., N) like x, in its own dtype: a second branch, with its own dropout.
        weight1: (N,): also return ``out1``, the same normalised rows scaled by weight1 and shifted by bias1.
        bias1: (N,), or None for no shift of out1.
        dropout_p: probability in [0, 1) of dropping an element of x, and of x1; those that stay are multiplied by
            1 / (1 - dropout_p). Decisions come from torch's generator of x's device, and backward repeats them.
        rowscale: (...) one constant for each row of x, such as stochastic depth's; no gradient is computed for it.
        layerscale: (N,), differentiable: one factor for each column of x [Touvron et al. 2021, arXiv:2103.17239].
        zero_centered_weight: weight and weight1 hold the distance from 1: scale by ``weight + 1``.
        out_dtype: of out and out1; x's by default.
        out: contiguous memory for the first output, where autograd does not record; it may be x.
        residual_out: with prenorm, contiguous memory for r, where autograd does not record; it may be residual.
        return_dropout_mask: also return, at the end, bool masks of x and x1: True where an element stayed; None
            without dropout, and without x1.

    Returns:
        out (..., N); with options a tuple of what there is of ``(out, out1, r, mask, mask1)``. out, out1 and r are
        differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
    """
    return _norm(
        *(x, x1, residual, rowscale, layerscale, weight, bias, weight1, bias1, eps, dropout_p, False),
        *(zero_centered_weight, prenorm, residual_in_fp32, out_dtype, out, residual_out, return_dropout_mask),
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Any, ...]:
    """RMSNorm over the last dimension of a sum: ``out = r / sqrt(mean(r^2) + eps) * weight + bias``. The sum r,
    arguments, results and errors are those of :func:`layer_norm`."""
    return _norm(
        *(x, x1, residual, rowscale, layerscale, weight, bias, weight1, bias1, eps, dropout_p, True),
        *(zero_centered_weight, prenorm, residual_in_fp32, out_dtype, out, residual_out, return_dropout_mask),
    )


def sum_dtype_of(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """The dtype of what is normalised."""
    dtype = x.dtype if residual is None else residual.dtype
    return torch.promote_types(dtype, torch.float32) if residual_in_fp32 else dtype


def records_gradients(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@once_for_like_calls
def _plan(
    tensors: tuple[Tensor | None, ...],
    eps: float,
    dropout_p: float,
    is_rms: bool,
    residual_in_fp32: bool,
    rowscale_requires_grad: bool,
) -> tuple[bool, torch.dtype, bool]:
    """Whether the kernels run, the dtype of what is normalised, and whether that may be other than x; of x, x1,
    residual, rowscale, layerscale, weight, bias, weight1 and bias1 that fit together."""
    x, weight = check_norm(tensors, eps, dropout_p, rowscale_requires_grad)
    _, x1, residual, rowscale, layerscale, _, bias, weight1, bias1 = tensors
    name = "rms_norm" if is_rms else "layer_norm"
    on_triton = runs_on_triton(name, x, residual, x1, weight, bias, weight1, bias1)
    sum_dtype = sum_dtype_of(x, residual, residual_in_fp32)
    adds = not (x1 is None and residual is None and rowscale is None and layerscale is None)
    return on_triton, sum_dtype, adds or dropout_p > 0 or sum_dtype != x.dtype


def _norm(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
    prenorm: bool,
    residual_in_fp32: bool,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    residual_out: Tensor | None,
    return_dropout_mask: bool,
) -> Tensor | tuple[Any, ...]:
    on_triton, sum_dtype, changes = _plan(
        (x, x1, residual, rowscale, layerscale, weight, bias, weight1, bias1),
        *(eps, dropout_p, is_rms, residual_in_fp32, getattr(rowscale, "requires_grad", False)),
    )
    recorded = records_gradients(x, weight, bias, x1, residual, layerscale, weight1, bias1)
    if out_dtype is None and out is None:
        out_dtype = x.dtype
    else:
        out_dtype = _checked_out_dtype(x, out, out_dtype, recorded)
    if residual_out is not None:
        if not prenorm:
            raise bad_argument("residual_out", "a tensor", "None without prenorm", "pass prenorm=True")
        check_written("residual_out", residual_out, x, sum_dtype, "the dtype of the sum", recorded)

    seed = draw_seed_and_offset(x.device) if dropout_p > 0 else None
    inputs = (x, x1, residual, rowscale, layerscale, seed, weight, bias, weight1, bias1)
    options = (eps, dropout_p, is_rms, zero_centered, out_dtype, sum_dtype)
    result1: Tensor | None
    total: Tensor | None
    # Otherwise the sum is x; but not for long if out is its memory.
    returns_sum = prenorm and (changes or out is not None or residual_out is not None)
    if not on_triton:
        result, result1, total = reference.forward(*inputs, *options)
        if residual_out is not None:
            total = residual_out.copy_(total)
        elif returns_sum and total is x:
            total = total.clone()
        out = result if out is None else out.copy_(result)
    elif recorded:
        results = apply(Norm, *inputs, options, returns_sum)
        if weight1 is None and not returns_sum:
            out = results
        else:
            out, *others = results
            result1 = others[0] if weight1 is not None else None
            total = others[-1] if returns_sum else None
    else:
        result, result1, total, _, _ = operators.forward(
            *inputs, *options, returns_sum, False, out, residual_out
        )
        tell_autograd(out, residual_out)
        out = result if out is None else out
        total = total if residual_out is None else residual_out
    if not (prenorm or return_dropout_mask or weight1 is not None):
        return out
    outputs = [out]
    if weight1 is not None:
        outputs.append(result1)
    if prenorm:
        outputs.append(total if returns_sum else x)
    if return_dropout_mask:
        outputs += [
            _mask(tensor, seed, dropout_p, branch, on_triton) for branch, tensor in enumerate((x, x1))
        ]
    return tuple(outputs)


def _checked_out_dtype(
    x: Tensor, out: Tensor | None, out_dtype: torch.dtype | None, recorded: bool
) -> torch.dtype:
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise bad_argument("out_dtype", repr(out_dtype), "a floating-point dtype", "pass torch.float32, say")
    if out is None:
        return out_dtype or x.dtype
    dtype = out_dtype or (out.dtype if isinstance(out, Tensor) else x.dtype)
    check_written("out", out, x, dtype, "out_dtype", recorded)
    return dtype


def _mask(
    x: Tensor | None, seed: Tensor | None, dropout_p: float, branch: int, on_triton: bool
) -> Tensor | None:
    if x is None or seed is None:
        return None
    if on_triton:
        return operators.dropout_mask(seed, x, dropout_p, branch)
    return keep_mask(seed, x.shape, dropout_p, branch)
