"""Linear layers cut along their outputs (column-parallel) or their inputs (row-parallel)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument, check_floating, check_given, check_same_device, check_shape
from flash_attn_ops.autocast import as_autocast, autocast_dtype
from flash_attn_ops.distributed import GroupLike, Partition, resolve_group
from flash_attn_ops.library import apply, once_differentiable

from .products import Layout, Needs, column_backward, column_forward, row_backward, row_forward


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    group: GroupLike = None,
    *,
    sequence_parallel: bool = True,
) -> Tensor:
    """x W_r^T + b_r: this rank's part of the outputs, for all tokens.

    Args:
        x: (T, ..., K), floating-point. With ``sequence_parallel`` T are the rank's tokens, of which all ranks have the
            same number, and they are gathered first; otherwise all ranks have the same x.
        weight: (N_r, K), this rank's rows, of x's dtype (under autocast, both are cast).
        bias: (N_r,), this rank's part.
        group: the ranks.

    Returns:
        (W T, ..., N_r) with ``sequence_parallel``, else (T, ..., N_r), of W ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    The gradient of x is added up over the ranks (and cut, with ``sequence_parallel``) while the gradient of the weight
    is computed. Gathered tokens are not kept for backward but gathered again, while the gradient of x is computed.
    """
    x, weight, bias = checked_product(x, weight, bias)
    return apply(_ColumnParallel, x, weight, bias, Layout(resolve_group(group), sequence_parallel))


def row_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    group: GroupLike = None,
    *,
    sequence_parallel: bool = True,
) -> Tensor:
    """sum over ranks r of x_r W_r^T, plus b.

    Args:
        x: (T, ..., K_r), this rank's part of the inputs, for all tokens.
        weight: (N, K_r), this rank's columns, of x's dtype (under autocast, both are cast).
        bias: (N,), which all ranks hold. It is added once, and its gradient is the same on all ranks.
        group: the ranks.

    Returns:
        (T, ..., N), the same on all ranks, or with ``sequence_parallel`` this rank's T / W of the tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; with ``sequence_parallel``, tokens that the W ranks do
            not divide.
    """
    x, weight, bias = checked_product(x, weight, bias)
    layout = Layout(resolve_group(group), sequence_parallel)
    if layout.gathers and x.shape[0] % layout.group.size:
        raise bad_argument(
            "x",
            f"{x.shape[0]} tokens in dimension 0",
            f"a multiple of {layout.group.size}, the ranks among which sequence parallelism shares them",
            "pad the tokens to a multiple, or pass sequence_parallel=False",
        )
    return apply(_RowParallel, x, weight, bias, layout)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        return column_forward(x, weight, bias, layout)

    @staticmethod
    @once_differentiable("column_parallel_linear")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:3])
        return *column_backward(gradient, x, weight, ctx.layout, needs), None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        return row_forward(x, weight, bias, layout)

    @staticmethod
    @once_differentiable("row_parallel_linear")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:3])
        return *row_backward(gradient, x, weight, ctx.layout, needs), None


def checked_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias that fit each other, as autocast gives them to a product."""
    check_given(x=x, weight=weight)
    check_floating(x=x, weight=weight, bias=bias)
    dtype = autocast_dtype(x)
    x, weight, bias = as_autocast(x, dtype), as_autocast(weight, dtype), as_autocast(bias, dtype)
    check_same_device(x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", "(outputs, inputs)", "pass a matrix")
    if x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise bad_argument(
            "x",
            f"shape {tuple(x.shape)}",
            f"(tokens, ..., {weight.shape[1]}), the inputs of this rank's weight",
            "pass this rank's part of the features",
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "one for each output of the weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise bad_argument(
                name, tensor.dtype, f"{x.dtype}, the dtype of x", f"use autocast, or x.to({tensor.dtype})"
            )
    return x, weight, bias


class _ParallelLinear(nn.Module, ABC):
    """A linear layer of which this rank holds a part."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        partition: Partition,
        in_features: int,
        out_features: int,
        group: GroupLike,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.group = resolve_group(group)
        self.partition = partition
        self.in_features, self.out_features = in_features, out_features
        self.sequence_parallel = sequence_parallel

    @abstractmethod
    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How parameters are cut: name, partition, dimension. All ranks hold the others alike."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what ``torch.nn.Linear`` draws for the whole layer, and keep this rank's part."""
        weight, bias = self.weight, self.bias
        whole = nn.Linear(
            *(self.in_features, self.out_features, bias is not None), device=weight.device, dtype=weight.dtype
        )
        cut = self.partitions()
        for name, parameter in self.named_parameters(recurse=False):
            values = getattr(whole, name)
            if name in cut:
                partition, dim = cut[name]
                values = partition.shard(values, self.group.rank, dim)
            parameter.copy_(values)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank {self.group.rank} of {self.group.size}, sequence_parallel={self.sequence_parallel}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """``torch.nn.Linear(in_features, out_features)`` cut along its outputs; see :func:`column_parallel_linear`.

    Args:
        in_features, out_features: of the whole layer.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for a single process.
        bias: whether there is one; it is cut as the outputs are.
        sequence_parallel: the input is cut along its tokens, dimension 0.
        multiple_of: the ranks' parts are multiples of it; the first ranks have one more where they are uneven.
        blocks: sizes of blocks of outputs that are cut each on its own (q, k and v; value and gate). A rank's outputs
            are its parts of all blocks, in order. ``multiple_of`` may then be one for each block.
        device, dtype: of the parameters ``weight`` (local outputs, in_features) and ``bias`` (local outputs,).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: GroupLike = None,
        *,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int | Sequence[int] = 1,
        blocks: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        resolved = resolve_group(group)
        partition = Partition.of(out_features, resolved.size, multiple_of, blocks)
        super().__init__(partition, in_features, out_features, resolved, sequence_parallel)
        local = partition.local_size(resolved.rank)
        self.weight = nn.Parameter(torch.empty(local, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(local, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        return {"weight": (self.partition, 0), "bias": (self.partition, 0)}

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, ..., in_features) -> (all tokens, ..., this rank's outputs)."""
        return column_parallel_linear(
            x, self.weight, self.bias, self.group, sequence_parallel=self.sequence_parallel
        )


class RowParallelLinear(_ParallelLinear):
    """``torch.nn.Linear(in_features, out_features)`` cut along its inputs; see :func:`row_parallel_linear`.

    Arguments and errors as of :class:`ColumnParallelLinear`, with inputs for outputs; ``sequence_parallel`` cuts the
    output along its tokens. The parameters are ``weight`` (out_features, local inputs), and ``bias`` (out_features,),
    which all ranks hold, so that they all load and save it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: GroupLike = None,
        *,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        resolved = resolve_group(group)
        partition = Partition.of(in_features, resolved.size, multiple_of)
        super().__init__(partition, in_features, out_features, resolved, sequence_parallel)
        local = partition.local_size(resolved.rank)
        self.weight = nn.Parameter(torch.empty(out_features, local, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        return {"weight": (self.partition, 1)}

    def forward(self, x: Tensor) -> Tensor:
        """x (all tokens, ..., this rank's inputs) -> (tokens, ..., out_features)."""
        return row_parallel_linear(
            x, self.weight, self.bias, self.group, sequence_parallel=self.sequence_parallel
        )
