"""Gradient norm, clipping and scaling, whatever the gradients are spread over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from flash_attn_models.tensor_parallel import reduce_gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flash_attn_train.distributed.mesh import data_parallel_mesh, tensor_parallel_mesh
from flash_attn_train.distributed.spread import cuts_of


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, mesh: DeviceMesh | None = None) -> Tensor:
    """Scales gradients down to a norm of at most ``max_norm``, on all ranks alike.

    To be called once per optimizer step, after backward: with sequence parallelism it first adds up the gradients
    that are sums over the ranks.

    Args:
        model: whose gradients they are; parameters without one are passed over.
        max_norm: infinity to only measure.
        mesh: of Lightning's ModelParallelStrategy, dimensions data_parallel and tensor_parallel; None for strategies
            that leave every rank with the same whole gradients (single, ddp, zero1).

    Returns:
        The L2 norm of all gradients together before clipping, a scalar on their device: of the whole model, in which
        every parameter counts once. Not finite if a gradient is not; gradients then become NaN.
    """
    if mesh is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    shards = tensor_parallel_mesh(mesh)
    if shards is not None:
        with _local_parameters(model):
            reduce_gradients(model)
    norm = _norm(model, mesh)
    if max_norm != float("inf"):
        # As torch.nn.utils.clip_grad_norm_ does.
        scale_gradients(model, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiplies all gradients by a scalar on their device, in place; of those that are cut, this rank's parts."""
    gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


@contextmanager
def _local_parameters(model: nn.Module) -> Iterator[None]:
    """Puts, in place of DTensors, this rank's part of each and of its gradient into the model, as plain parameters:
    what tensor-parallel ranks do with whole ones they do with each data-parallel part of them."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    local = nn.Parameter(parameter.to_local(), parameter.requires_grad)
                    local.grad = None if parameter.grad is None else _local(parameter.grad)
                    replaced.append((module, name, parameter))
                    module._parameters[name] = local
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _norm(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """The norm of gradients that are cut over the mesh."""
    shards, replicas = tensor_parallel_mesh(mesh), data_parallel_mesh(mesh)
    rank = 0 if shards is None else shards.get_local_rank()
    # Rows of parameters that tensor-parallel ranks share out; where several hold the same rows, the first counts.
    cut = cuts_of(model, shards)
    spread: list[Tensor] = []  # over the data-parallel ranks
    whole: list[Tensor] = []
    device = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        if parameter.grad is None or (name not in cut and rank > 0):
            continue
        gradient = parameter.grad
        part = _local(gradient)
        if name in cut:
            partition, dim = cut[name]
            counted = _own_entries(partition.ranges(rank), [partition.ranges(r) for r in range(rank)])
            if counted is not None:
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()  # small: keys and values that ranks share
                    whole.append(gradient.index_select(dim, counted.to(device)))
                    continue
                part = part.index_select(dim, counted.to(device))
        (spread if isinstance(gradient, DTensor) else whole).append(part)
    squares = _sum_of_squares(spread, device)
    if replicas is not None and any(isinstance(p, DTensor) for p in model.parameters()):
        dist.all_reduce(squares, group=replicas.get_group())
    squares = squares + _sum_of_squares(whole, device)
    if shards is not None:
        dist.all_reduce(squares, group=shards.get_group())
    return squares.sqrt()


def _own_entries(own: list[range], of_lower_ranks: list[list[range]]) -> Tensor | None:
    """Which of this rank's entries no lower rank has, as local indices; None for all of them."""
    lower = [part for ranges in of_lower_ranks for part in ranges]
    if not any(mine.start < part.stop and part.start < mine.stop for mine in own for part in lower):
        return None
    entries = [entry for part in own for entry in part]
    kept = [index for index, entry in enumerate(entries) if not any(entry in part for part in lower)]
    return torch.tensor(kept, dtype=torch.int64)


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.stack([norm.to(device) for norm in norms]).square().sum()


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
