"""Collectives with gradients, in three pairs: the backward of each is the forward of its partner.

| function | forward | backward | takes a tensor |
|---|---|---|---|
| `all_gather` | all-gather | reduce-scatter | from shards to a whole of which ranks make different use |
| `reduce_scatter` | reduce-scatter | all-gather | from partial sums to shards of the sum |
| `all_reduce` | all-reduce | identity | from partial sums to the sum, which all ranks use alike |
| `copy_to_ranks` | identity | all-reduce | from one that all ranks have alike to different uses |
| `gather_shards` | all-gather | own shard | from shards to a whole which all ranks use alike |
| `take_shard` | own shard | all-gather | from one that all ranks have alike to shards |

The right one follows from what comes after: if every rank goes on with its own part of the work, gradients of the
ranks add up; if all ranks do the same work, they hold the same gradient, and adding would count it once for each rank.
[Narayanan et al. 2021, arXiv:2104.04473; Korthikanti et al. 2022, arXiv:2205.05198]

Gradients are differentiable in turn. torch's own functional collectives are not used with their gradients, which
know one meaning of each collective only: an all-reduce there reduces the gradient again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_ops.arguments import bad_argument

from .group import Group, GroupLike, resolve_group
from .pending import all_gather_async, all_reduce_async, dimension, reduce_scatter_async

Sizes = Sequence[int] | None


def all_gather(x: Tensor, group: GroupLike, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """Concatenate the ranks' x along ``dim``; the gradient of x adds up what all ranks have for it.

    Args:
        x: any dtype; of one shape on all ranks, except along ``dim`` with ``sizes``.
        sizes: the ranks' sizes along ``dim``, where they differ.

    Raises:
        ValueError: ``dim`` or ``sizes`` that do not fit x and the group.
    """
    return _gather(x, resolve_group(group), dim, sizes, "all_gather", "reduce_scatter")


def gather_shards(x: Tensor, group: GroupLike, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """As :func:`all_gather`, for a result that all ranks use alike: the gradient of x is its part of the gradient."""
    return _gather(x, resolve_group(group), dim, sizes, "all_gather", "own_shard")


def reduce_scatter(x: Tensor, group: GroupLike, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """Add up the ranks' x, of one shape, and keep this rank's part of ``dim``; gradients are gathered.

    Args:
        sizes: the ranks' parts of ``dim``; equal ones by default.

    Raises:
        ValueError: ``dim`` or ``sizes`` that do not fit x and the group; without ``sizes``, ranks that do not divide
            ``dim``.
    """
    return _scatter(x, resolve_group(group), dim, sizes, "reduce_scatter", "all_gather")


def take_shard(x: Tensor, group: GroupLike, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """Keep this rank's part of an x that all ranks have alike; gradients are gathered. Errors: as reduce_scatter."""
    return _scatter(x, resolve_group(group), dim, sizes, "own_shard", "all_gather")


def all_reduce(x: Tensor, group: GroupLike) -> Tensor:
    """Add up the ranks' x; the gradient passes as it is, since all ranks have the same."""
    return _apply(x, resolve_group(group), 0, "all_reduce", "identity")


def copy_to_ranks(x: Tensor, group: GroupLike) -> Tensor:
    """x itself, of which the ranks go on to make different uses: their gradients are added up."""
    return _apply(x, resolve_group(group), 0, "identity", "all_reduce")


def _own_shard(x: Tensor, group: Group, dim: int) -> Tensor:
    size = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * size, size).clone()


_KINDS: dict[str, Callable[[Tensor, Group, int], Tensor]] = {
    "all_gather": lambda x, group, dim: all_gather_async(x, group, dim).wait(),
    "reduce_scatter": lambda x, group, dim: reduce_scatter_async(x, group, dim).wait(),
    "all_reduce": lambda x, group, dim: all_reduce_async(x, group).wait(),
    "own_shard": _own_shard,
    "identity": lambda x, group, dim: x.view_as(x),
}


class _Collective(torch.autograd.Function):
    """One kind forward, its partner backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, forward: str, backward: str) -> Tensor:
        ctx.group, ctx.dim, ctx.kinds = group, dim, (forward, backward)
        return _KINDS[forward](x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        forward, backward = ctx.kinds
        return _apply(gradient, ctx.group, ctx.dim, backward, forward), None, None, None, None


def _apply(x: Tensor, group: Group, dim: int, forward: str, backward: str) -> Tensor:
    return x if group.size == 1 else _Collective.apply(x, group, dim, forward, backward)


def _gather(x: Tensor, group: Group, dim: int, sizes: Sizes, forward: str, backward: str) -> Tensor:
    dim = dimension(x, dim)
    if sizes is None:
        return _apply(x, group, dim, forward, backward)
    _check_sizes(
        sizes, group, x.shape[dim], sizes[group.rank] if group.rank < len(sizes) else 0, "of this rank"
    )
    longest = max(sizes)
    whole = _apply(_padded(x, dim, longest), group, dim, forward, backward)
    return torch.cat(
        [whole.narrow(dim, rank * longest, size) for rank, size in enumerate(sizes)], dim
    )  # without the padding


def _scatter(x: Tensor, group: Group, dim: int, sizes: Sizes, forward: str, backward: str) -> Tensor:
    dim = dimension(x, dim)
    if sizes is None:
        if x.shape[dim] % group.size:
            raise bad_argument(
                "x",
                f"{x.shape[dim]} entries in dimension {dim}",
                f"a multiple of {group.size}, the ranks that share them",
                "pad them to a multiple (sequence parallelism cuts the tokens), or pass sizes",
            )
        return _apply(x, group, dim, forward, backward)
    _check_sizes(sizes, group, x.shape[dim], sum(sizes), "together")
    longest = max(sizes)
    parts = [_padded(part, dim, longest) for part in x.split(tuple(sizes), dim)]
    return _apply(torch.cat(parts, dim), group, dim, forward, backward).narrow(dim, 0, sizes[group.rank])


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, size - x.shape[dim]])


def _check_sizes(sizes: Sequence[int], group: Group, entries: int, named: int, whose: str) -> None:
    if len(sizes) != group.size or min(sizes) < 0 or named != entries:
        raise bad_argument(
            "sizes",
            list(sizes),
            f"a size >= 0 for each of {group.size} ranks, {entries} {whose}, as x has",
            "pass what get_dim_for_local_rank gives for each rank",
        )
