"""Dense layers in plain torch operations, for autograd to differentiate: the definition of what they compute."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flash_attn_ops.activations import reference as activations
from flash_attn_ops.activations.names import split


def mlp(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    order: str | None = None,
) -> Tensor:
    """``act(x weight1' + bias1) weight2' + bias2``; with an order, the first product is a packed gate and value."""
    pre = F.linear(x, weight1, bias1)
    gate, value = (pre, None) if order is None else split(pre, order)
    return F.linear(activations.forward(gate, None, value, activation), weight2, bias2)
