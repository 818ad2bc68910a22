"""Feed-forward layers whose hidden features are cut over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash_attn_ops.activations import Activation, GatedActivation
from flash_attn_ops.arguments import bad_argument
from flash_attn_ops.distributed import GroupLike
from flash_attn_ops.launch import ceil_div

from .linear import ColumnParallelLinear, RowParallelLinear


class ParallelMLP(nn.Module):
    """fc2(activation(fc1(x))), with the hidden features cut over the ranks: fc1 column-parallel, fc2 row-parallel.

    Args:
        in_features: of the input.
        hidden_features: of all ranks together; 4 * in_features by default.
        out_features: in_features by default.
        activation: a name that :func:`flash_attn_ops.activations.activate` knows ("gelu", "gelu_tanh", "relu",
            "squared_relu", "silu", "sigmoid", ...), or an elementwise function.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for a single process.
        sequence_parallel: input and output are cut along their tokens, dimension 0; otherwise all ranks have the same
            input and output.
        bias1, bias2: whether fc1 and fc2 have one.
        multiple_of: the ranks' parts of the hidden features are multiples of it.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation; sizes that do not fit each other.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        group: GroupLike = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation: Callable[[Tensor], Tensor] = (
            Activation(activation) if isinstance(activation, str) else _checked(activation)
        )
        self.fc1 = ColumnParallelLinear(
            in_features,
            hidden,
            group,
            bias=bias1,
            sequence_parallel=sequence_parallel,
            multiple_of=multiple_of,
            device=device,
            dtype=dtype,
        )
        self.fc2 = RowParallelLinear(
            hidden,
            out,
            group,
            bias=bias2,
            sequence_parallel=sequence_parallel,
            multiple_of=multiple_of,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (tokens, ..., out_features)."""
        return self.fc2(self.activation(self.fc1(x)))


class ParallelGatedMLP(nn.Module):
    """fc2(value * activation(gate)) with [value | gate] = fc1(x) (Shazeer 2020, arXiv:2002.05202), cut as
    :class:`ParallelMLP`: a rank's fc1 holds its rows of value, then its rows of gate.

    Args:
        hidden_features: of value and of gate each; by default 8/3 of in_features, rounded up to ``multiple_of``.
        activation: of the gate, by name ("silu" makes it SwiGLU, "gelu" GEGLU), or an elementwise function.
        multiple_of: the ranks' parts of the hidden features are multiples of it.

    Other arguments and errors as of :class:`ParallelMLP`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        group: GroupLike = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = (
            ceil_div(8 * in_features // 3, multiple_of) * multiple_of
            if hidden_features is None
            else hidden_features
        )
        out = in_features if out_features is None else out_features
        self.gated: Callable[[Tensor], Tensor] = (
            GatedActivation(activation, "value_gate")
            if isinstance(activation, str)
            else _gated(_checked(activation))
        )
        self.fc1 = ColumnParallelLinear(
            in_features,
            2 * hidden,
            group,
            bias=bias1,
            sequence_parallel=sequence_parallel,
            multiple_of=multiple_of,
            blocks=(hidden, hidden),
            device=device,
            dtype=dtype,
        )
        self.fc2 = RowParallelLinear(
            hidden,
            out,
            group,
            bias=bias2,
            sequence_parallel=sequence_parallel,
            multiple_of=multiple_of,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (tokens, ..., out_features)."""
        return self.fc2(self.gated(self.fc1(x)))


def _checked(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not callable(activation):
        raise bad_argument("activation", activation, "a name or a function", "pass 'gelu', say")
    return activation


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of the packed [value | gate]."""

    def gated(packed: Tensor) -> Tensor:
        value, gate = packed.chunk(2, dim=-1)
        return value * activation(gate)

    return gated
