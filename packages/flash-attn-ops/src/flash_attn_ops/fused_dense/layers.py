"""Dense layers under autograd: products by torch or with cuBLASLt epilogues, activations by kernels or reference.

Everything is two-dimensional here, of one dtype, contiguous or not. Only the gradients that are needed are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from flash_attn_kernels import gemm
from torch import Tensor

from flash_attn_ops.activations import operators as kernels
from flash_attn_ops.activations import reference
from flash_attn_ops.activations.names import split
from flash_attn_ops.library import once_differentiable

from .operators import column_sums


class Steps(NamedTuple):
    """How an MLP is computed: its activation, what it keeps for backward, what is an epilogue (see ``plans``)."""

    activation: str
    order: str | None  # of a packed gate and value; None is not gated
    checkpoint_lvl: int
    on_triton: bool
    forward_epilogue: bool
    backward_epilogue: bool
    bias_epilogue: bool
    products: bool
    algorithm: int

    @property
    def plain_algorithm(self) -> int | None:
        """Of products without an epilogue of ours; None leaves them to torch."""
        return self.algorithm if self.products else None

    @property
    def saves_out(self) -> bool:
        """A relu is above 0 where its argument is, and its own relu: what it was applied to need not be kept."""
        return self.activation == "relu" and self.order is None


class Linear(torch.autograd.Function):
    """``x weight' + bias``, and x again if its gradient is to be added to that of the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        return_residual: bool,
        on_triton: bool,
        bias_epilogue: bool,
        products: bool,
        algorithm: int,
    ) -> tuple[Tensor, Tensor | None]:
        needs_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_weight else None, weight if ctx.needs_input_grad[0] else None)
        plain_algorithm = algorithm if products else None
        ctx.bias_algorithm = algorithm if bias_epilogue else None
        ctx.plain_algorithm, ctx.on_triton = plain_algorithm, on_triton
        ctx.set_materialize_grads(False)
        return product_with_bias(x, weight, bias, plain_algorithm), x.view_as(x) if return_residual else None

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx: Any, d_out: Tensor | None, d_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return d_residual, None, None, None, None, None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_weight, d_bias = weight_and_bias_gradient(
            *(d_out, x, needs_weight, needs_bias, ctx.bias_algorithm, ctx.plain_algorithm, ctx.on_triton)
        )
        d_x = input_gradient(d_out, weight, d_residual, ctx.plain_algorithm) if needs_x else None
        return d_x, d_weight, d_bias, None, None, None, None, None


class Mlp(torch.autograd.Function):
    """``act(x weight1' + bias1) weight2' + bias2``, gated if there is an order, and x again as in :class:`Linear`.

    Checkpoint level 0 keeps pre-activation and activation, 1 recomputes the activation, 2 both, at the price of
    the first product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        return_residual: bool,
        *steps: Any,
    ) -> tuple[Tensor, Tensor | None]:
        how = Steps(*steps)
        keeps = how.checkpoint_lvl < 2
        saved, act = hidden(x, weight1, bias1, how, save=keeps)
        needs_x, needs_weight1, needs_bias1, needs_weight2, *_ = ctx.needs_input_grad
        needs_hidden = needs_x or needs_weight1 or needs_bias1
        ctx.save_for_backward(
            x if needs_weight1 or not keeps else None,
            weight1 if needs_x or not keeps else None,
            None if keeps else bias1,
            weight2 if needs_hidden else None,
            saved if keeps and (needs_hidden or how.checkpoint_lvl == 1) else None,
            act if how.checkpoint_lvl == 0 and needs_weight2 else None,
        )
        ctx.how, ctx.bias1_dtype = tuple(how), None if bias1 is None else bias1.dtype
        ctx.set_materialize_grads(False)
        out = product_with_bias(act, weight2, bias2, how.plain_algorithm)
        return out, x.view_as(x) if return_residual else None

    @staticmethod
    @once_differentiable("an MLP")
    def backward(ctx: Any, d_out: Tensor | None, d_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        how = Steps(*ctx.how)
        no_options = (None,) * (1 + len(how))
        if d_out is None:
            return d_residual, None, None, None, None, *no_options
        x, weight1, bias1, weight2, saved, act = ctx.saved_tensors
        needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2, *_ = ctx.needs_input_grad
        if how.checkpoint_lvl == 2:
            saved, act = hidden(x, weight1, bias1, how, save=True)
        elif act is None and how.saves_out and not how.backward_epilogue:
            act = saved
        d_pre, d_bias1 = None, None
        if needs_x or needs_weight1 or needs_bias1:
            bias1_dtype = ctx.bias1_dtype if needs_bias1 else None
            wants_act = needs_weight2 and act is None
            d_pre, d_bias1, recomputed = hidden_gradient(d_out, weight2, saved, bias1_dtype, wants_act, how)
            act = recomputed if wants_act else act
        if needs_weight2 and act is None:
            act = activation_of(saved, how)
        d_weight2, d_bias2 = weight_and_bias_gradient(
            *(d_out, act, needs_weight2, needs_bias2),
            *(how.algorithm if how.bias_epilogue else None, how.plain_algorithm, how.on_triton),
        )
        d_weight1, d_x = None, None
        if needs_weight1 and d_pre is not None:
            d_weight1 = product(d_pre.t(), x, how.plain_algorithm)
        if needs_x and d_pre is not None:
            d_x = input_gradient(d_pre, weight1, d_residual, how.plain_algorithm)
        return d_x, d_weight1, d_bias1, d_weight2, d_bias2, *no_options


def hidden(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Steps, *, save: bool
) -> tuple[Tensor | None, Tensor]:
    """``(saved, act)``: what the gradient of the activation will need, and the activation."""
    if how.forward_epilogue and bias is not None:
        needs_aux = save and not (how.saves_out and not how.backward_epilogue)
        name: gemm.Activation = "relu" if how.activation == "relu" else "gelu_tanh"
        act, saved = gemm.linear_act(x, weight, bias, name, save=needs_aux, algorithm=how.algorithm)
        return saved if needs_aux else act, act
    pre = product_with_bias(x, weight, bias, how.plain_algorithm)
    act = activation_of(pre, how)
    return act if how.saves_out else pre, act


def activation_of(pre: Tensor, how: Steps) -> Tensor:
    gate, value = (pre, None) if how.order is None else split(pre, how.order)
    act: Tensor = (kernels if how.on_triton else reference).forward(gate, None, value, how.activation)
    return act


def hidden_gradient(
    d_out: Tensor,
    weight2: Tensor,
    saved: Tensor,
    bias_dtype: torch.dtype | None,
    wants_act: bool,
    how: Steps,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(d_pre, d_bias1, act)``: the gradient through second layer and activation; its sums; the activation again."""
    if how.backward_epilogue:
        name: gemm.Activation = "relu" if how.activation == "relu" else "gelu_tanh"
        d_pre, d_bias = gemm.act_gradient(
            d_out, weight2, saved, name, bias_gradient=bias_dtype is not None, algorithm=how.algorithm
        )
        return d_pre, d_bias, activation_of(saved, how) if wants_act else None
    gate, value = (saved, None) if how.order is None else split(saved, how.order)
    backward = (kernels if how.on_triton else reference).backward
    d_pre, _, d_bias, act = backward(
        *(product(d_out, weight2, how.plain_algorithm), gate, None, value),
        *(how.activation, how.order, bias_dtype, wants_act),
    )
    return d_pre, None if bias_dtype is None else d_bias, act


def weight_and_bias_gradient(
    d_out: Tensor,
    x: Tensor | None,
    needs_weight: bool,
    needs_bias: bool,
    bias_algorithm: int | None,
    plain_algorithm: int | None,
    on_triton: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of a layer's weight and bias, for the gradient of its result; as one product if it has an algorithm."""
    if needs_weight and needs_bias and bias_algorithm is not None and x is not None:
        return gemm.weight_and_bias_gradient(d_out, x, algorithm=bias_algorithm)
    d_weight = product(d_out.t(), x, plain_algorithm) if needs_weight and x is not None else None
    if not needs_bias:
        return d_weight, None
    return d_weight, column_sums(d_out) if on_triton else d_out.sum(0)


def input_gradient(d_out: Tensor, weight: Tensor, d_residual: Tensor | None, algorithm: int | None) -> Tensor:
    """Of a layer's input, to which the gradient of the returned input is added in the same product."""
    if d_residual is not None:
        return torch.addmm(d_residual, d_out, weight)
    return product(d_out, weight, algorithm)


def product(a: Tensor, b: Tensor, algorithm: int | None) -> Tensor:
    """``a b`` by cuBLASLt with this algorithm, or by torch."""
    return a @ b if algorithm is None else gemm.matmul(a, b, algorithm=algorithm)


def product_with_bias(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: int | None) -> Tensor:
    """``x weight' + bias`` likewise."""
    if algorithm is None:
        return F.linear(x, weight, bias)
    return gemm.linear(x, weight, bias, algorithm=algorithm)
