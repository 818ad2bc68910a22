"""A tensor-parallel MLP as one node of autograd, which keeps less for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ops.arguments import bad_argument
from flash_attn_ops.autocast import as_autocast, autocast_dtype
from flash_attn_ops.distributed import GroupLike
from flash_attn_ops.distributed.pending import all_gather_async
from flash_attn_ops.library import once_differentiable

from .linear import checked_product
from .mlp import ParallelMLP
from .products import Layout, Needs, column_backward, column_forward, row_backward, row_forward


class ParallelFusedMLP(ParallelMLP):
    """:class:`ParallelMLP` that can compute hidden features again in backward instead of keeping them.

    Args:
        activation: the name of one, as :class:`ParallelMLP` takes; "gelu_approx" by default.
        checkpoint_lvl: what backward computes again.

            ===== =================================== =======================================
            level kept, of T tokens, H hidden features computed again
            ===== =================================== =======================================
            0     2 T H / W values                    nothing
            1     T H / W values                      the activation
            2     nothing of the hidden features      fc1 and the activation
            ===== =================================== =======================================

            No level repeats communication: the input that level 2 needs is gathered for the gradient of fc1 anyway.
            Under torch.compile all levels leave it to the compiler, which computes activations again by itself.

    Other arguments and errors as of :class:`ParallelMLP`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str = "gelu_approx",
        checkpoint_lvl: Literal[0, 1, 2] = 0,
        group: GroupLike = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if checkpoint_lvl not in (0, 1, 2):
            raise bad_argument("checkpoint_lvl", checkpoint_lvl, "0, 1 or 2", "choose one")
        super().__init__(
            in_features,
            hidden_features,
            out_features,
            activation=activation,
            group=group,
            sequence_parallel=sequence_parallel,
            bias1=bias1,
            bias2=bias2,
            multiple_of=multiple_of,
            device=device,
            dtype=dtype,
        )
        self.checkpoint_lvl = checkpoint_lvl

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (tokens, ..., out_features)."""
        if self.checkpoint_lvl == 0 or torch.compiler.is_compiling():
            return super().forward(x)
        fc1, fc2 = self.fc1, self.fc2
        tensors = checked_product(x, fc1.weight, fc1.bias)
        dtype = autocast_dtype(x)
        tensors2 = as_autocast(fc2.weight, dtype), as_autocast(fc2.bias, dtype)
        layout = Layout(fc1.group, fc1.sequence_parallel)
        return _RecomputingMLP.apply(*tensors, *tensors2, self.activation, layout, self.checkpoint_lvl)


class _RecomputingMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: Callable[[Tensor], Tensor],
        layout: Layout,
        level: int,
    ) -> Tensor:
        hidden = column_forward(x, weight1, bias1, layout)
        ctx.save_for_backward(x, weight1, bias1, weight2, hidden if level == 1 else None)
        ctx.activation, ctx.layout = activation, layout
        return row_forward(activation(hidden), weight2, bias2, layout)

    @staticmethod
    @once_differentiable("ParallelFusedMLP")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gathered = None
        if hidden is None:
            gathered = all_gather_async(x, ctx.layout.group).wait() if ctx.layout.gathers else x
            hidden = F.linear(gathered, weight1, bias1)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            activated = ctx.activation(leaf)
        of_activated, of_weight2, of_bias2 = row_backward(
            gradient, activated.detach(), weight2, ctx.layout, Needs(any(needs[:3]), needs[3], needs[4])
        )
        of_x = of_weight1 = of_bias1 = None
        if of_activated is not None:
            (of_hidden,) = torch.autograd.grad(activated, leaf, of_activated)
            of_x, of_weight1, of_bias1 = column_backward(
                of_hidden, x, weight1, ctx.layout, Needs(*needs[:3]), gathered
            )
        return of_x, of_weight1, of_bias1, of_weight2, of_bias2, None, None, None
