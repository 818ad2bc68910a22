"""Feed-forward layers: plain and gated."""

from __future__ import annotations

import torch
from flash_attn_ops.fused_dense import FusedGatedMLP, FusedMLP


class MLP(FusedMLP):
    """fc2(activation(fc1(x))), computed by ``flash_attn_ops.fused_dense.mlp``, which has more options.

    Args:
        activation: "gelu_tanh", "gelu", "relu", "squared_relu", "silu" or "sigmoid".
        bias: of both layers.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_inner, bias1=bias, bias2=bias, activation=activation, device=device, dtype=dtype
        )


class GatedMLP(FusedGatedMLP):
    """fc2(value * activation(gate)) with [value | gate] = fc1(x), computed by ``flash_attn_ops.fused_dense.gated_mlp``.

    Args:
        activation: "silu" is SwiGLU, "gelu" and "gelu_tanh" GEGLU, "relu" ReGLU, "sigmoid" GLU (Shazeer 2020,
            arXiv 2002.05202).
        bias: of both layers.
        multiple_of: d_inner is rounded up to a multiple of it.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        *,
        activation: str = "silu",
        bias: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(d_model, d_inner),
            bias1=bias,
            bias2=bias,
            activation=activation,
            order="value_gate",
            multiple_of=multiple_of,
            device=device,
            dtype=dtype,
        )
