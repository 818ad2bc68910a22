"""Activations in plain torch operations: the definition, and what runs where the kernels do not.

Computed in float32 (float64 for float64 tensors); each result is rounded once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of x, in the dtype of x."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return x.relu()
    if activation == "squared_relu":
        return x.relu().square()
    return F.silu(x) if activation == "silu" else x.sigmoid()


def derivative(x: Tensor, activation: str) -> Tensor:
    """d activate(x) / d x."""
    if activation == "gelu":
        density = torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    if activation == "gelu_tanh":
        tanh = torch.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x**3))
        inner = _TANH_SCALE * (1 + 3 * _TANH_CUBIC * x.clamp(-10, 10).square())  # beyond, 1 - tanh^2 is 0
        return 0.5 * (1 + tanh) + 0.5 * x.clamp(-10, 10) * (1 - tanh.square()) * inner
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "squared_relu":
        return 2 * x.relu()
    sigmoid = x.sigmoid()
    if activation == "silu":
        return sigmoid * (1 + x * (1 - sigmoid))
    return sigmoid * (1 - sigmoid)


def forward(x: Tensor, bias: Tensor | None, value: Tensor | None, activation: str) -> Tensor:
    """``activation(x + bias) * value`` in the dtype of x, contiguous."""
    out = activate(_pre(x, bias), activation)
    if value is not None:
        out = out * _exact(value)
    return out.to(x.dtype).contiguous()


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
    """The gradients that ``operators.backward`` gives, in the same form."""
    pre, upstream = _pre(x, bias), _exact(d_out)
    d_x = upstream * derivative(pre, activation)
    d_value = None
    if value is not None:
        d_x, d_value = d_x * _exact(value), (upstream * activate(pre, activation)).to(x.dtype)
    d_x = d_x.to(x.dtype)
    if order is not None and d_value is not None:
        d_x = torch.cat((d_x, d_value) if order == "gate_value" else (d_value, d_x), dim=-1)
        d_value = None
    d_bias = None
    if bias_dtype is not None:
        d_bias = _exact(d_x).reshape(-1, d_x.shape[-1]).sum(0).to(bias_dtype)
    return d_x, d_value, d_bias, forward(x, bias, value, activation) if with_out else None


def _pre(x: Tensor, bias: Tensor | None) -> Tensor:
    return _exact(x) if bias is None else _exact(x) + _exact(bias)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
