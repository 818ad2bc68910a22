"""The norm kernels under autograd. What is stored for backward: the sum (x itself if nothing was added to it), the
statistics, the dropout's seed, and x where layerscale wants a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.library import once_differentiable

from . import operators

_NUM_INPUTS = 12


class Norm(torch.autograd.Function):
    """``(out, out1, sum)``: of these what there is, out1 with weight1 and the sum if the caller returns it; out by
    itself, since each result costs."""

    @staticmethod
    def forward(
        ctx: Any,
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
        options: tuple[float, float, bool, bool, torch.dtype, torch.dtype],
        returns_sum: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        # Of options: eps, dropout_p, is_rms, zero_centered, out_dtype, sum_dtype. One argument, since each costs.
        _, dropout_p, is_rms, zero_centered, _, _ = options
        scaled = not (rowscale is None and layerscale is None and seed is None)
        stores_sum = returns_sum or scaled or x1 is not None or residual is not None
        out, out1, total, mean, rstd = operators.forward(
            *(x, x1, residual, rowscale, layerscale, seed, weight, bias, weight1, bias1),
            *options,
            *(stores_sum, True, None, None),
        )
        ctx.save_for_backward(
            total if stores_sum else x,
            x if layerscale is not None and layerscale.requires_grad else None,
            *(rowscale, layerscale, seed, weight, weight1, None if is_rms else mean, rstd),
        )
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, x1, residual, bias, bias1)]
        # One attribute, since each costs.
        ctx.facts = dtypes, scaled, weight1 is not None, returns_sum, dropout_p, is_rms, zero_centered
        ctx.set_materialize_grads(False)
        if weight1 is None:
            return (out, total) if returns_sum else out
        return (out, out1, total) if returns_sum else (out, out1)

    @staticmethod
    @once_differentiable("a norm")
    def backward(ctx: Any, d_out: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        dtypes, scaled, returned_out1, returned_sum, *options = ctx.facts
        d_out1 = others[0] if returned_out1 else None
        d_sum = others[-1] if returned_sum else None
        total, x, rowscale, layerscale, seed, weight, weight1, mean, rstd = ctx.saved_tensors
        x_dtype, x1_dtype, residual_dtype, bias_dtype, bias1_dtype = dtypes
        without_out = d_out is None
        if without_out:
            if d_out1 is None and d_sum is None:
                return (None,) * _NUM_INPUTS
            d_out, bias_dtype = weight.new_zeros(total.shape[-1]).expand(total.shape), None
        if d_out1 is None:
            weight1 = bias1_dtype = None
        # The gradient of a sum is that of each of its terms: it is written once for each dtype.
        x1_index = 0 if not scaled and x1_dtype == x_dtype else 1
        residual_index = 2
        if not scaled and residual_dtype == x_dtype:
            residual_index = 0
        elif seed is None and residual_dtype == x1_dtype:
            residual_index = 1
        results = operators.backward(
            *(d_out, d_out1, d_sum, total, x, rowscale, layerscale, seed, weight, weight1, mean, rstd),
            *(*options, x_dtype),
            *(x1_dtype if x1_index == 1 else None, residual_dtype if residual_index == 2 else None),
            *(bias_dtype, bias1_dtype),
        )
        _, _, _, dw, db, dw1, db1, d_layerscale = results
        return (
            results[0],
            None if x1_dtype is None else results[x1_index],
            None if residual_dtype is None else results[residual_index],
            None,
            None if x is None else d_layerscale,
            None,
            None if without_out else dw,
            None if bias_dtype is None else db,
            None if weight1 is None else dw1,
            None if bias1_dtype is None else db1,
            *(None, None),
        )
