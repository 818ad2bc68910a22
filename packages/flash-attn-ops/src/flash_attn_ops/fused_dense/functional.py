"""The functions of dense layers: arguments checked, cast under autocast, planned, flattened to rows."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_ops.activations.names import Order, activation_name, check_order
from flash_attn_ops.arguments import bad_argument, check_floating, check_given, check_same_device, check_shape
from flash_attn_ops.autocast import as_autocast, autocast_dtype, dtype_as_autocast
from flash_attn_ops.dispatch import has_memory, once_for_like_calls, runs_on_triton
from flash_attn_ops.library import apply

from .layers import Linear, Mlp, Steps, hidden, product_with_bias
from .plans import Heuristic, MlpProblem, Plan, check_heuristic, plan_linear, plan_mlp


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
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    plan, on_triton = _linear_plan((x, weight, bias), dtype, heuristic)
    if dtype is not None:
        x, weight, bias = as_autocast(x, dtype), as_autocast(weight, dtype), as_autocast(bias, dtype)
    rows = _rows(x)
    if _needs_gradient(x, weight, bias):
        out, residual = apply(
            *(Linear, rows, weight, bias, return_residual, on_triton),
            *(plan.bias, plan.products, plan.algorithm),
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
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    tensors = (x, weight1, bias1, weight2, bias2)
    how = _mlp_steps(tensors, dtype, activation, order, checkpoint_lvl, heuristic)
    if dtype is not None:
        x, weight1, bias1 = as_autocast(x, dtype), as_autocast(weight1, dtype), as_autocast(bias1, dtype)
        weight2, bias2 = as_autocast(weight2, dtype), as_autocast(bias2, dtype)
    rows = _rows(x)
    if _needs_gradient(x, weight1, bias1, weight2, bias2):
        out, residual = apply(Mlp, rows, weight1, bias1, weight2, bias2, return_residual, *how)
    else:
        _, act = hidden(rows, weight1, bias1, how, save=False)
        out, residual = product_with_bias(act, weight2, bias2, how.plain_algorithm), rows
    return _shaped(out, residual, x, return_residual)


@once_for_like_calls
def _linear_plan(
    tensors: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype | None, heuristic: Heuristic
) -> tuple[Plan, bool]:
    """What is an epilogue, and whether kernels run; of x, weight and bias that fit, under autocast to ``dtype``."""
    x, weight, bias = tensors
    check_heuristic(heuristic)
    check_given(x=x, weight=weight)
    check_floating(x=x, weight=weight, bias=bias)
    _check_layer(x, weight, bias, "weight", "bias", x.shape[-1:], dtype)
    rows = _rows(x)
    plan = plan_linear(
        *(rows.shape[0], weight.shape[1], weight.shape[0]),
        *(dtype_as_autocast(x, dtype), _device_type(x), heuristic),
    )
    return plan, runs_on_triton("linear", as_autocast(rows, dtype))


@once_for_like_calls
def _mlp_steps(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    dtype: torch.dtype | None,
    activation: str,
    order: str | None,
    checkpoint_lvl: int,
    heuristic: Heuristic,
) -> Steps:
    """How it is computed; of x, weight1, bias1, weight2 and bias2 that fit, under autocast to ``dtype``."""
    x, weight1, bias1, weight2, bias2 = tensors
    check_heuristic(heuristic)
    check_checkpoint_lvl(checkpoint_lvl)
    check_given(x=x, weight1=weight1, weight2=weight2)
    check_floating(x=x, weight1=weight1, weight2=weight2, bias1=bias1, bias2=bias2)
    _check_layer(x, weight1, bias1, "weight1", "bias1", x.shape[-1:], dtype)
    rows_out = weight1.shape[0]
    if order is not None and rows_out % 2 != 0:
        got = f"shape {tuple(weight1.shape)}"
        raise bad_argument("weight1", got, "(2H, K)", "put the weights of gate and value into one tensor")
    width = rows_out if order is None else rows_out // 2
    _check_layer(x, weight2, bias2, "weight2", "bias2", torch.Size((width,)), dtype)

    rows = _rows(x)
    problem = MlpProblem(
        tokens=rows.shape[0],
        in_features=weight1.shape[1],
        hidden_features=width,
        out_features=weight2.shape[0],
        dtype=dtype_as_autocast(x, dtype),
        device_type=_device_type(x),
        activation=activation,
        gated=order is not None,
        has_bias1=bias1 is not None,
        checkpoint_lvl=checkpoint_lvl,
    )
    plan = plan_mlp(problem, heuristic)
    operation = "mlp" if order is None else "gated_mlp"
    return Steps(
        activation,
        order,
        checkpoint_lvl,
        weight1.numel() > 0 and runs_on_triton(operation, as_autocast(rows, dtype)),
        forward_epilogue=plan.forward,
        backward_epilogue=plan.backward,
        bias_epilogue=plan.bias,
        products=plan.products,
        algorithm=plan.algorithm,
    )


def _device_type(x: Tensor) -> str:
    """For a plan: that of the meta device, where nothing runs, if there is no memory for cuBLASLt to read."""
    return x.device.type if has_memory(x) else "meta"


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


def _check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_name: str,
    bias_name: str,
    in_features: torch.Size,
    dtype: torch.dtype | None,
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
        if tensor is not None and dtype_as_autocast(tensor, dtype) != dtype_as_autocast(x, dtype):
            expected, fix = f"{x.dtype}, the dtype of x", f"convert it, {name}.to({x.dtype}), or use autocast"
            raise bad_argument(name, tensor.dtype, expected, fix)
