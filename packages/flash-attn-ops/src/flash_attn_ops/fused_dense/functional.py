"""The functions of dense layers: arguments checked, cast under autocast, planned, flattened to rows."""

from __future__ import annotations

import torch
from flash_attn_kernels.autocast import autocast_is_on, to_autocast_dtype
from torch import Tensor

from flash_attn_ops.activations.names import Order, activation_name, check_order
from flash_attn_ops.arguments import bad_argument, check_floating, check_same_device, check_shape
from flash_attn_ops.dispatch import runs_on_triton

from .layers import Linear, Mlp, Steps, hidden, product_with_bias
from .plans import Heuristic, MlpProblem, check_heuristic, plan_linear, plan_mlp


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    return_residual: bool = False,
    heuristic: Heuristic = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``x weight' + bias``.

    Args:
        x: (..., K), any floating-point dtype and strides.
        weight: (N, K) in x's dtype, bias: (N,) in x's dtype, or None.
        return_residual: also return x, whose gradient is then added in the product that computes the gradient of x.
        heuristic: whether the bias gradient is an epilogue, and whose products are taken; see :func:`mlp`.

    Returns:
        (..., N) in x's dtype, or ``(out, x)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown heuristic.
    """
    check_heuristic(heuristic)
    check_floating(x=x, weight=weight, bias=bias)
    x, weight, bias = _cast(x), _cast(weight), _cast_bias(bias)
    _check_layer(x, weight, bias, "weight", "bias", x.shape[-1:])
    rows = _rows(x)
    plan = plan_linear(rows.shape[0], weight.shape[1], weight.shape[0], x.dtype, x.device.type, heuristic)
    if _needs_gradient(x, weight, bias):
        on_triton = runs_on_triton("linear", rows)
        out, residual = Linear.apply(
            *(rows, weight, bias, return_residual, on_triton, plan.bias, plan.products, plan.algorithm)
        )
    else:
        out, residual = product_with_bias(rows, weight, bias, plan.algorithm if plan.products else None), rows
    return _shaped(out, residual, x, return_residual)


def mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: Heuristic = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``act(x weight1' + bias1) weight2' + bias2``.

    Args:
        x: (..., K), any floating-point dtype and strides.
        weight1: (H, K), weight2: (N, H), bias1: (H,) or None, bias2: (N,) or None, all in x's dtype.
        activation: "gelu_tanh", "gelu", "relu", "squared_relu", "silu" or "sigmoid" (or another name of these, see
            ``activations.activate``).
        return_residual: also return x, whose gradient is then added in the product that computes the gradient of x.
        checkpoint_lvl: what is kept for backward besides x. 0: pre-activation and activation (relu: the activation
            alone, or it and a bit mask); 1: the pre-activation, the activation is recomputed, in the pass that needs
            it anyway; 2: nothing, the first product is recomputed as well.
        heuristic: what cuBLASLt does in its epilogues, on a GPU in float16 and bfloat16. "auto": what was measured
            to be faster than kernels of their own; -1: nothing; k >= 0: everything it can, with its k-th candidate
            algorithm; "tune": as "auto", and every product, with an epilogue or without, takes the candidate that is
            fastest when all are timed, once for each problem (which waits for the GPU, and does not happen while a
            CUDA graph is captured). It can do bias, gelu_tanh and relu, for sizes that are multiples of 8 (relu with
            a bit mask: of 128). Anything else, on any device, is computed by products of torch's and passes over
            memory, with the same results up to rounding.

    Returns:
        (..., N) in x's dtype, or ``(out, x)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, level or heuristic.
        RuntimeError: a heuristic that is no candidate of cuBLASLt's.
    """
    name = activation_name(activation)
    return _mlp(x, weight1, weight2, bias1, bias2, name, None, return_residual, checkpoint_lvl, heuristic)


def gated_mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str = "silu",
    order: Order = "value_gate",
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: Heuristic = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``(act(gate) * value) weight2' + bias2``, where gate and value are the halves of ``x weight1' + bias1``.

    Args:
        weight1: (2H, K), bias1: (2H,) or None.
        activation: of the gate: "silu" makes SwiGLU, "gelu" GEGLU, "relu" ReGLU, "sigmoid" GLU.
        order: "value_gate" if the second half of weight1 makes the gate, as in FlashAttention's GatedMlp;
            "gate_value" if the first half does.

    The other arguments, results and errors as :func:`mlp`; of cuBLASLt's epilogues only bias and its gradient apply.
    """
    check_order(order)
    name = activation_name(activation)
    return _mlp(x, weight1, weight2, bias1, bias2, name, order, return_residual, checkpoint_lvl, heuristic)


def _mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    order: str | None,
    return_residual: bool,
    checkpoint_lvl: int,
    heuristic: Heuristic,
) -> Tensor | tuple[Tensor, Tensor]:
    check_heuristic(heuristic)
    check_checkpoint_lvl(checkpoint_lvl)
    check_floating(x=x, weight1=weight1, weight2=weight2, bias1=bias1, bias2=bias2)
    x, weight1, weight2 = _cast(x), _cast(weight1), _cast(weight2)
    bias1, bias2 = _cast_bias(bias1), _cast_bias(bias2)
    _check_layer(x, weight1, bias1, "weight1", "bias1", x.shape[-1:])
    rows_out = weight1.shape[0]
    if order is not None and rows_out % 2 != 0:
        got = f"shape {tuple(weight1.shape)}"
        raise bad_argument("weight1", got, "(2H, K)", "put the weights of gate and value into one tensor")
    width = rows_out if order is None else rows_out // 2
    _check_layer(x, weight2, bias2, "weight2", "bias2", torch.Size((width,)))

    rows = _rows(x)
    problem = MlpProblem(
        *(rows.shape[0], weight1.shape[1], width, weight2.shape[0], x.dtype, x.device.type),
        *(activation, order is not None, bias1 is not None, checkpoint_lvl),
    )
    plan = plan_mlp(problem, heuristic)
    on_triton = weight1.numel() > 0 and runs_on_triton("mlp" if order is None else "gated_mlp", rows)
    how = Steps(
        activation,
        order,
        checkpoint_lvl,
        on_triton,
        forward_epilogue=plan.forward,
        backward_epilogue=plan.backward,
        bias_epilogue=plan.bias,
        products=plan.products,
        algorithm=plan.algorithm,
    )
    if _needs_gradient(x, weight1, bias1, weight2, bias2):
        out, residual = Mlp.apply(rows, weight1, bias1, weight2, bias2, return_residual, *how)
    else:
        _, act = hidden(rows, weight1, bias1, how, save=False)
        out, residual = product_with_bias(act, weight2, bias2, how.plain_algorithm), rows
    return _shaped(out, residual, x, return_residual)


def check_checkpoint_lvl(checkpoint_lvl: int) -> None:
    if checkpoint_lvl not in (0, 1, 2):
        raise bad_argument("checkpoint_lvl", repr(checkpoint_lvl), "0, 1 or 2", "use 0 to recompute nothing")


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _shaped(
    out: Tensor, residual: Tensor | None, x: Tensor, return_residual: bool
) -> Tensor | tuple[Tensor, Tensor]:
    out = out.reshape(*x.shape[:-1], out.shape[-1])
    return (out, residual.view(x.shape)) if return_residual and residual is not None else out


def _cast(x: Tensor) -> Tensor:
    """As autocast hands a tensor to a product."""
    return to_autocast_dtype(x, x.device.type) if autocast_is_on(x) else x


def _cast_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _cast(bias)


def _check_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_name: str, bias_name: str, in_features: torch.Size
) -> None:
    check_same_device(**{"x": x, weight_name: weight, bias_name: bias})
    if x.dim() == 0:
        raise bad_argument("x", "a scalar", "at least one dimension, (..., K)", "pass x[None]")
    if weight.dim() != 2 or weight.shape[1:] != in_features:
        got, expected = f"shape {tuple(weight.shape)}", f"(out features, {in_features[0]})"
        raise bad_argument(weight_name, got, expected, "pass a weight that takes what is multiplied by it")
    if bias is not None:
        check_shape(bias_name, bias, weight.shape[:1], f"the out features of {weight_name}")
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            expected, fix = f"{x.dtype}, the dtype of x", f"convert it, {name}.to({x.dtype}), or use autocast"
            raise bad_argument(name, tensor.dtype, expected, fix)
