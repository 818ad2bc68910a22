"""Activations and gated activations, with a bias in front if wanted, forward and backward in one pass over memory.

    gelu (exact):  x * (1 + erf(x / sqrt 2)) / 2            [Hendrycks & Gimpel 2016, arXiv:1606.08415]
    gelu (tanh):   x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2                        [ibid.]
    squared_relu:  max(x, 0)^2                                            [So et al. 2021, arXiv:2109.08668]
    silu:          x / (1 + exp(-x))                             [Elfwing et al. 2017, arXiv:1702.03118]
    gated:         activation(gate) * value: swiglu, geglu, reglu   [Shazeer 2020, arXiv:2002.05202]

The arithmetic is float32 (float64 for float64 tensors), autocast or not; results have the dtype of the first argument.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_floating, check_given, check_same_device, check_shape
from flash_attn_ops.dispatch import once_for_like_calls, runs_on_triton
from flash_attn_ops.library import apply, once_differentiable

from . import operators, reference
from .names import ACTIVATIONS, Order, activation_name, check_order, split

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "GatedActivation",
    "activate",
    "bias_gelu",
    "gated",
    "geglu",
    "gelu",
    "reglu",
    "relu",
    "silu",
    "squared_relu",
    "swiglu",
]

Approximate = Literal["none", "tanh"]


def activate(x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """``activation(x + bias)``.

    Args:
        x: (..., N), any floating-point dtype and strides.
        activation: "gelu", "gelu_tanh", "relu", "squared_relu", "silu" or "sigmoid"; "gelu_approx", "sqrelu" and
            "swish" are other names of the second, fourth and fifth.
        bias: (N,), any floating-point dtype. The sum is not rounded before the activation.

    Returns:
        (..., N) in x's dtype, contiguous.

    Raises:
        ValueError: an unknown name; shapes, dtypes or devices that do not fit.
    """
    name = activation_name(activation)
    on_triton = _plan((x, bias), name)
    if x.dim() == 0:
        return activate(x[None], name)[0]
    if not on_triton:
        return reference.forward(x, bias, None, name)
    return _activate(x, bias, None, name, None)


def gated(
    gate: Tensor, value: Tensor | None = None, *, activation: str, order: Order | None = None
) -> Tensor:
    """``activation(gate) * value``, of two tensors or of one that holds both.

    Args:
        gate: (..., N), any floating-point dtype and strides; (..., 2N) without ``value``.
        value: (..., N), in the dtype of gate; or None: gate is packed.
        activation: a name as in :func:`activate`.
        order: of a packed tensor, and for that alone: "gate_value" if its first half is the gate, "value_gate" if
            its second half is (as in FlashAttention's GatedMlp).

    Returns:
        (..., N) in gate's dtype, contiguous.

    Raises:
        ValueError: an unknown name; no order for a packed tensor, or one for two tensors; shapes, dtypes or devices
            that do not fit.
    """
    name = activation_name(activation)
    if not _gated_plan((gate, value), name, order):
        first, second = (gate, value) if value is not None else split(gate, str(order))
        return reference.forward(first, None, second, name)
    return _activate(gate, None, value, name, order)


@once_for_like_calls
def _plan(tensors: tuple[Tensor, Tensor | None], name: str) -> bool:
    """Whether the kernels run; of x and bias that fit."""
    x, bias = tensors
    check_given(x=x)
    check_floating(x=x, bias=bias)
    check_same_device(x=x, bias=bias)
    if bias is not None:
        if x.dim() == 0:
            raise bad_argument("x", "a scalar", "at least one dimension, (..., N)", "leave the bias out")
        check_shape("bias", bias, x.shape[-1:], "the last dimension of x")
    return runs_on_triton(name, x, bias)


@once_for_like_calls
def _gated_plan(tensors: tuple[Tensor, Tensor | None], name: str, order: Order | None) -> bool:
    """Whether the kernels run; of gate and value that fit."""
    gate, value = tensors
    check_given(gate=gate)
    check_floating(gate=gate, value=value)
    check_same_device(gate=gate, value=value)
    if gate.dim() == 0:
        raise bad_argument("gate", "a scalar", "at least one dimension, (..., N)", "pass gate[None]")
    if value is None:
        check_order(order)
        if gate.shape[-1] % 2 != 0:
            got = f"shape {tuple(gate.shape)}"
            raise bad_argument("gate", got, "(..., 2N) without a value", "pass gate and value together")
        return runs_on_triton(f"gated {name}", gate)
    if order is not None:
        raise bad_argument("order", repr(order), "None beside a value", "leave it out: nothing is packed")
    check_shape("value", value, gate.shape, "the shape of gate")
    if value.dtype != gate.dtype:
        raise bad_argument(
            "value",
            value.dtype,
            f"{gate.dtype}, the dtype of gate",
            f"convert it: value.to({gate.dtype})",
        )
    return runs_on_triton(f"gated {name}", gate, value)


def gelu(x: Tensor, approximate: Approximate = "none") -> Tensor:
    """GELU, exact or by its tanh approximation. x, result and errors as :func:`activate`."""
    return activate(x, _gelu_name(approximate))


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of ``x + bias``. x, bias, result and errors as :func:`activate`."""
    return activate(x, _gelu_name(approximate), bias)


def relu(x: Tensor) -> Tensor:
    """max(x, 0). x, result and errors as :func:`activate`."""
    return activate(x, "relu")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2. x, result and errors as :func:`activate`."""
    return activate(x, "squared_relu")


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). x, result and errors as :func:`activate`."""
    return activate(x, "silu")


def swiglu(gate: Tensor, value: Tensor | None = None, *, order: Order | None = None) -> Tensor:
    """silu(gate) * value. Arguments, result and errors as :func:`gated`."""
    return gated(gate, value, activation="silu", order=order)


def geglu(
    gate: Tensor,
    value: Tensor | None = None,
    *,
    approximate: Approximate = "none",
    order: Order | None = None,
) -> Tensor:
    """gelu(gate) * value. Arguments, result and errors as :func:`gated`."""
    return gated(gate, value, activation=_gelu_name(approximate), order=order)


def reglu(gate: Tensor, value: Tensor | None = None, *, order: Order | None = None) -> Tensor:
    """relu(gate) * value. Arguments, result and errors as :func:`gated`."""
    return gated(gate, value, activation="relu", order=order)


def _gelu_name(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise bad_argument("approximate", repr(approximate), "'none' or 'tanh'", "use one of these")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _activate(
    x: Tensor, bias: Tensor | None, value: Tensor | None, activation: str, order: Order | None
) -> Tensor:
    """By the kernels. With an order, x is packed and there is no value."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (value is not None and value.requires_grad)
    ):
        return apply(_Activate, x, bias, value, activation, order)
    gate, behind = (x, value) if order is None else split(x, order)
    return operators.forward(gate, bias, behind, activation)


class _Activate(torch.autograd.Function):
    """The kernels under autograd. With an order, x is packed and there is no value."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, value: Tensor | None, activation: str, order: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, bias, value)
        ctx.activation, ctx.order = activation, order
        gate, behind = (x, value) if order is None else split(x, order)
        return operators.forward(gate, bias, behind, activation)

    @staticmethod
    @once_differentiable("an activation")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, value = ctx.saved_tensors
        gate, behind = (x, value) if ctx.order is None else split(x, ctx.order)
        bias_dtype = bias.dtype if bias is not None and ctx.needs_input_grad[1] else None
        d_x, d_value, d_bias, _ = operators.backward(
            d_out, gate, bias, behind, ctx.activation, ctx.order, bias_dtype, False
        )
        return (
            d_x,
            None if bias_dtype is None else d_bias,
            None if value is None else d_value,
            None,
            None,
        )


class Activation(nn.Module):
    """:func:`activate` by name."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation_name(activation)

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, self.activation)

    def extra_repr(self) -> str:
        return self.activation


class GatedActivation(nn.Module):
    """:func:`gated` of a packed tensor, (..., 2N) to (..., N)."""

    def __init__(self, activation: str, order: Order) -> None:
        super().__init__()
        check_order(order)
        self.activation = activation_name(activation)
        self.order: Order = order

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, activation=self.activation, order=self.order)

    def extra_repr(self) -> str:
        return f"{self.activation}, order={self.order}"
