"""Collectives that run while the caller computes, without gradients.

They are torch's functional collectives, called as operators: those return at once, are waited for by another
operator, and a compiler records both. Their Python wrappers are left out: in eager they return a tensor subclass that
waits at its first use, which costs host time at each operation on it and hides where the waiting happens; and their
gradients differ between releases of torch (:mod:`.collectives` defines ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_ops.arguments import bad_argument

from .group import GroupLike, resolve_group


@dataclass(frozen=True)
class Pending:
    """A collective under way. :meth:`wait` must be called, and only its result may be used: once, for a compiler
    tells the tensor before the wait from the one after."""

    out: Tensor
    is_running: bool
    dim: int = 0

    def wait(self) -> Tensor:
        """The result. On a GPU the current stream waits, not the host."""
        out = torch.ops._c10d_functional.wait_tensor(self.out) if self.is_running else self.out
        return out.movedim(0, self.dim) if self.dim else out

    @classmethod
    def ready(cls, out: Tensor) -> Pending:
        """Nothing to wait for."""
        return cls(out, is_running=False)


def all_gather_async(x: Tensor, group: GroupLike, dim: int = 0) -> Pending:
    """Start to concatenate the ranks' x, all of one shape, along ``dim``.

    x must not change until the wait. With ``dim`` other than 0 the result is a transposed view.
    """
    group, dim, x = resolve_group(group), dimension(x, dim), _without_gradient(x)
    if group.size == 1:
        return Pending.ready(x)
    shard = x.movedim(dim, 0).contiguous()
    if x.numel() == 0:
        return Pending(x.new_empty((group.size * shard.shape[0], *shard.shape[1:])), False, dim)
    out = torch.ops._c10d_functional.all_gather_into_tensor(shard, group.size, group.name)
    return Pending(out, True, dim)


def reduce_scatter_async(x: Tensor, group: GroupLike, dim: int = 0) -> Pending:
    """Start to add up the ranks' x, all of one shape, and to give each rank its equal part of ``dim``.

    Raises:
        ValueError: when the ranks do not divide ``dim``.
    """
    group, dim, x = resolve_group(group), dimension(x, dim), _without_gradient(x)
    if x.shape[dim] % group.size:
        raise bad_argument(
            "x",
            f"{x.shape[dim]} entries in dimension {dim}",
            f"a multiple of {group.size}, the ranks that share them",
            "pad them to a multiple (sequence parallelism cuts the tokens), or give reduce_scatter the sizes",
        )
    if group.size == 1:
        return Pending.ready(x)
    whole = x.movedim(dim, 0).contiguous()
    if x.numel() == 0:
        return Pending(x.new_empty((whole.shape[0] // group.size, *whole.shape[1:])), False, dim)
    out = torch.ops._c10d_functional.reduce_scatter_tensor(whole, "sum", group.size, group.name)
    return Pending(out, True, dim)


def all_reduce_async(x: Tensor, group: GroupLike, *, inplace: bool = False) -> Pending:
    """Start to add up the ranks' x, all of one shape. ``inplace`` gives x up to the result, which saves a copy."""
    group, x = resolve_group(group), _without_gradient(x)
    if group.size == 1 or x.numel() == 0:
        return Pending.ready(x)
    if inplace and x.is_contiguous() and not torch.compiler.is_compiling():  # compilers do so on their own
        return Pending(torch.ops._c10d_functional.all_reduce_(x, "sum", group.name), True)
    return Pending(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.name), True)


def dimension(x: Tensor, dim: int) -> int:
    """``dim`` counted from the front."""
    if not -x.dim() <= dim < x.dim():
        raise bad_argument("dim", dim, f"a dimension of {tuple(x.shape)}", "pass one that x has")
    return dim % x.dim()


def _without_gradient(x: Tensor) -> Tensor:
    """Some releases of torch would give the collectives gradients of their own."""
    return x.detach() if x.requires_grad and torch.is_grad_enabled() else x
