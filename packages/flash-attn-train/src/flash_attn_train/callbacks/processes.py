"""Which processes share the batches of a step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy


def data_parallel_group(trainer: pl.Trainer) -> Any:
    """The group of the processes that have different batches; None stands for all processes.

    With tensor parallelism, several processes work on the same batch.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return trainer.strategy.device_mesh["data_parallel"].get_group()
    return None


def is_first_of_group(group: Any) -> bool:
    """Whether this process is the first of a group, as one process alone is."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank(group) == 0


def any_process(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether ``flag`` is set in any process. All processes must call it together."""
    if trainer.world_size == 1:
        return flag
    total = trainer.strategy.reduce(
        torch.tensor(float(flag), device=trainer.strategy.root_device), reduce_op="sum"
    )
    return bool(total > 0)
