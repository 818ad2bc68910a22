"""Between whole tensors and what a rank has of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from flash_attn_train.distributed.mesh import tensor_parallel_mesh


class Partition(Protocol):
    """How tensor-parallel layers of flash_attn_models say what their ranks have of a dimension."""

    @property
    def size(self) -> int: ...
    def sizes(self) -> tuple[int, ...]: ...
    def ranges(self, rank: int) -> list[range]: ...
    def shard(self, whole: Tensor, rank: int, dim: int = 0) -> Tensor: ...
    def combine(self, shards: list[Tensor], dim: int = 0) -> Tensor: ...


Cut = tuple[Partition, int]  # how tensor-parallel ranks share a tensor, and along which dimension
Cuts = dict[str, Cut]


def cuts_of(model: nn.Module, shards: DeviceMesh | None) -> Cuts:
    """How entries of the model's state dict are cut over tensor-parallel ranks; all have the others alike."""
    if shards is None:
        return {}
    cuts: Cuts = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        partitions = getattr(module, "partitions", None)
        if callable(partitions):
            cuts |= {f"{prefix}.{name}" if prefix else name: cut for name, cut in partitions().items()}
    return cuts


@torch.no_grad()
def whole_of(value: Any, cut: Cut | None, shards: DeviceMesh | None, *, keep: bool) -> Any:
    """The whole tensor on the CPU, of parts that all ranks bring; None for ranks that do not ``keep`` it."""
    if not isinstance(value, Tensor):
        return value if keep else None
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if cut is not None and shards is not None:
        partition, dim = cut
        value = partition.combine(_gather(value.detach(), shards, dim, partition.sizes()), dim)
    return value.detach().cpu() if keep else None


@torch.no_grad()
def spread_like(target: Tensor, whole: Any, cut: Cut | None, shards: DeviceMesh | None) -> Any:
    """This rank's part of a whole tensor, spread as ``target`` is, on its device."""
    if cut is not None and shards is not None:
        partition, dim = cut
        whole = partition.shard(whole, shards.get_local_rank(), dim)
    if not isinstance(target, DTensor):
        return whole.to(target.device)
    # Every rank has the whole, so none needs to be sent anything.
    return distribute_tensor(
        whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def load_part(model: nn.Module, whole: Mapping[str, Tensor], mesh: DeviceMesh | None) -> None:
    """Loads this rank's part of the state dict of a single process's model into a tensor-parallel rank's."""
    shards = tensor_parallel_mesh(mesh)
    cuts = cuts_of(model, shards)
    parts = {
        name: spread_like(target, whole[name], cuts.get(name), shards)
        for name, target in model.state_dict().items()
    }
    model.load_state_dict(parts)


def _gather(part: Tensor, shards: DeviceMesh, dim: int, sizes: tuple[int, ...]) -> list[Tensor]:
    """All ranks' parts, which have these sizes along ``dim``."""
    # Not every backend takes unequal sizes.
    shape = list(part.shape)
    shape[dim] = max(sizes)
    padded = part.new_zeros(shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=shards.get_group())
    return [other.narrow(dim, 0, size) for other, size in zip(gathered, sizes, strict=True)]
