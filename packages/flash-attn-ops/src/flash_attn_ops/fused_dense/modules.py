"""Modules of dense layers, initialised as ``torch.nn.Linear`` is, with the parameter names of FlashAttention's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn_ops.activations.names import Order, activation_name, check_order
from flash_attn_ops.arguments import bad_argument

from .functional import check_checkpoint_lvl, gated_mlp, linear, mlp
from .plans import Heuristic, check_heuristic


class FusedDense(nn.Linear):
    """:func:`linear` with its weight and bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        heuristic: Heuristic = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_heuristic(heuristic)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual
        self.heuristic: Heuristic = heuristic

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return linear(
            x,
            self.weight,
            self.bias,
            return_residual=self.return_residual,
            heuristic=self.heuristic,
        )


class _TwoLayers(nn.Module):
    """What both MLPs share: two layers, of which only the parameters are used, and the options."""

    def __init__(
        self,
        in_features: int,
        fc1_features: int,
        hidden_features: int,
        out_features: int | None,
        bias1: bool,
        bias2: bool,
        activation: str,
        return_residual: bool,
        checkpoint_lvl: int,
        heuristic: Heuristic,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_heuristic(heuristic)
        check_checkpoint_lvl(checkpoint_lvl)
        self.activation = activation_name(activation)
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic: Heuristic = heuristic
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, fc1_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation}, checkpoint_lvl={self.checkpoint_lvl}, heuristic={self.heuristic}"
        )


class FusedMLP(_TwoLayers):
    """:func:`mlp` with its parameters, ``fc1`` and ``fc2``. hidden_features is 4 in_features if not given."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_tanh",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Heuristic = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        super().__init__(
            *(in_features, hidden_features, hidden_features, out_features, bias1, bias2),
            *(activation, return_residual, checkpoint_lvl, heuristic, device, dtype),
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return mlp(
            *(x, self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias),
            activation=self.activation,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
        )


class FusedGatedMLP(_TwoLayers):
    """:func:`gated_mlp` with its parameters, ``fc1`` of 2 hidden_features and ``fc2``.

    hidden_features is 8/3 in_features if not given, and is rounded up to a multiple of ``multiple_of``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "silu",
        order: Order = "value_gate",
        multiple_of: int = 128,
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Heuristic = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_order(order)
        if multiple_of < 1:
            raise bad_argument("multiple_of", multiple_of, "a number >= 1", "use 1 to round nothing")
        hidden_features = 8 * in_features // 3 if hidden_features is None else hidden_features
        hidden_features = (hidden_features + multiple_of - 1) // multiple_of * multiple_of
        super().__init__(
            *(in_features, 2 * hidden_features, hidden_features, out_features, bias1, bias2),
            *(activation, return_residual, checkpoint_lvl, heuristic, device, dtype),
        )
        self.order: Order = order

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return gated_mlp(
            *(x, self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias),
            activation=self.activation,
            order=self.order,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}"
