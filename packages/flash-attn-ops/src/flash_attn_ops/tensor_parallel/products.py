"""The matrix products of tensor-parallel layers and their gradients, overlapped with the communication around them.

Plain functions without autograd: :mod:`.linear` and :mod:`.fused_mlp` make layers of them. Shapes: x (T, ..., K),
weight (N, K), with T the tokens: this rank's with sequence parallelism, else all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ops.distributed.group import Group
from flash_attn_ops.distributed.pending import (
    Pending,
    all_gather_async,
    all_reduce_async,
    reduce_scatter_async,
)

# Cutting a product in up to three costs it some efficiency, about the same time whatever its size. It pays where the
# rank's own rows are many, and are a large part of all rows.
OVERLAP_MIN_ROWS = 2048
OVERLAP_MAX_RANKS = 4


class Layout(NamedTuple):
    """The group, and whether the tokens outside of the layer are cut over its ranks."""

    group: Group
    sequence_parallel: bool

    @property
    def gathers(self) -> bool:
        return self.sequence_parallel and self.group.size > 1


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    weight: bool
    bias: bool


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def column_forward(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x W^T + b for all tokens."""
    if not layout.gathers:
        return F.linear(x, weight, bias)
    return _product_of_gathered(x, all_gather_async(x, layout.group), weight, bias, layout.group)[0]


def column_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, layout: Layout, needs: Needs, gathered: Tensor | None = None
) -> Gradients:
    """Gradients of x, weight and bias. ``gathered`` is x for all tokens, where the caller has it already.

    While x is gathered again (its tokens from other ranks were not kept) the gradient of x is computed; while that is
    added up over the ranks, the gradient of the weight is.
    """
    whole_x = Pending.ready(x if gathered is None else gathered)
    if needs.weight and gathered is None and layout.gathers:
        whole_x = all_gather_async(x, layout.group)
    pending_gradient: Pending | None = None
    if needs.x:
        partial = gradient @ weight
        pending_gradient = (
            reduce_scatter_async(partial, layout.group)
            if layout.gathers
            else all_reduce_async(partial, layout.group, inplace=True)
        )
    of_bias = _rows(gradient).sum(0) if needs.bias else None
    of_weight = _of_weight(gradient, whole_x.wait()) if needs.weight else None
    return pending_gradient.wait() if pending_gradient is not None else None, of_weight, of_bias


def row_forward(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """The sum over the ranks of x W^T, plus b, for the rank's tokens.

    All ranks hold the bias, and the first one's product adds it, where it costs nothing: the sum has it once.
    """
    partial = F.linear(x, weight, bias if layout.group.rank == 0 else None)
    if layout.gathers:
        return reduce_scatter_async(partial, layout.group).wait()
    return all_reduce_async(partial, layout.group, inplace=True).wait()


def row_backward(gradient: Tensor, x: Tensor, weight: Tensor, layout: Layout, needs: Needs) -> Gradients:
    """Gradients of x, weight and bias. The bias's is the same on all ranks, to the bit: each sums all tokens."""
    of_x = None
    if not layout.gathers:
        of_x = gradient @ weight if needs.x else None
    elif needs.x:
        pending = all_gather_async(gradient, layout.group)
        of_x, gradient = _product_of_gathered(gradient, pending, weight.t(), None, layout.group)
    else:
        gradient = all_gather_async(gradient, layout.group).wait()
    of_weight = _of_weight(gradient, x) if needs.weight else None
    return of_x, of_weight, _rows(gradient).sum(0) if needs.bias else None


def overlaps_own_rows(rows: int, ranks: int) -> bool:
    """Whether the product of this rank's own rows is computed apart, while the others' arrive."""
    return rows >= OVERLAP_MIN_ROWS and ranks <= OVERLAP_MAX_RANKS


def _product_of_gathered(
    own: Tensor, pending: Pending, weight: Tensor, bias: Tensor | None, group: Group
) -> tuple[Tensor, Tensor]:
    """``gathered @ weight.T + bias`` and ``gathered``, which is under way; ``own`` is this rank's part of it."""
    rows = _rows(own)
    if torch.compiler.is_compiling() or not overlaps_own_rows(rows.shape[0], group.size):
        gathered = pending.wait()
        return F.linear(gathered, weight, bias), gathered
    out = own.new_empty((own.shape[0] * group.size, *own.shape[1:-1], weight.shape[0]))
    out_rows = _rows(out)
    start, end = group.rank * rows.shape[0], (group.rank + 1) * rows.shape[0]
    _product_into(out_rows[start:end], rows, weight, bias)
    gathered = pending.wait()
    all_rows = _rows(gathered)
    for part in (slice(0, start), slice(end, None)):
        if out_rows[part].shape[0] > 0:
            _product_into(out_rows[part], all_rows[part], weight, bias)
    return out, gathered


def _product_into(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    return _rows(gradient).t() @ _rows(x)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)  # reshape would not know how many rows no columns make
