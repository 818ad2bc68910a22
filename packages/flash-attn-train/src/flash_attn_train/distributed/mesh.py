"""The two dimensions over which devices are spread, and this process's place in them."""

from __future__ import annotations

import pytorch_lightning as pl
from torch.distributed.device_mesh import DeviceMesh

# Names of Lightning's ModelParallelStrategy.
DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"


def data_parallel_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that have the same part of the model and other data; None for a single one."""
    return _part(mesh, DATA_PARALLEL)


def tensor_parallel_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that share each layer and have the same data; None for a single one."""
    return _part(mesh, TENSOR_PARALLEL)


def _part(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    if mesh is None or mesh[name].size() == 1:
        return None
    return mesh[name]


def data_parallel_rank(trainer: pl.Trainer) -> tuple[int, int]:
    """This process's rank among those that have different data, and how many these are.

    Known once training has begun: in loaders and callbacks.
    """
    where = trainer.distributed_sampler_kwargs
    return (0, 1) if where is None else (where["rank"], where["num_replicas"])
