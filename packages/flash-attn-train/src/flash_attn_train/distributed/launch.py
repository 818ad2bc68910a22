"""Which process this is, also before torch.distributed knows, and what one process decides for all.

Three ways to start the processes of a run are known: torchrun and SLURM's srun, which start all of them, and
Lightning, where the first process starts the others, late, when training begins.
"""

from __future__ import annotations

import os
import pickle
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

T = TypeVar("T")

# What rank 0 decided before Lightning started the other processes, which find it here: a variable for each decision.
_DECISION = "FLASH_ATTN_TRAIN_DECISION_{}"
_LARGEST_DECISION = 1 << 16  # bytes; Linux has 128 KiB for a variable
_decisions = 0


def cluster_environment() -> ClusterEnvironment | None:
    """What started the processes of this run, if it started all of them: torchrun or SLURM.

    SLURM's requeueing is left to :class:`flash_attn_train.distributed.Interruption`: Lightning's saves wherever in a
    step the signal arrives.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)
    return None


def rank() -> int:
    """This process's number among all of the run, from 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    environment = cluster_environment()
    return local_rank() if environment is None else environment.global_rank()


def local_rank() -> int:
    """This process's number among those of its machine, from 0: its device's."""
    environment = cluster_environment()
    return int(os.environ.get("LOCAL_RANK", 0)) if environment is None else environment.local_rank()


def world_size() -> int:
    """Processes of the run that are there. Lightning's own are not before training begins: 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    environment = cluster_environment()
    if environment is None:
        return int(os.environ.get("WORLD_SIZE", 1)) if is_lightning_child() else 1
    return environment.world_size()


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def is_lightning_child() -> bool:
    """Whether Lightning started this process from another one of the run."""
    return cluster_environment() is None and int(os.environ.get("LOCAL_RANK", 0)) > 0


def on_rank_zero(
    function: Callable[[], T], *, accelerator: str = "auto", timeout: timedelta = timedelta(hours=12)
) -> T:
    """Calls a function on rank 0 while the others wait, and gives all ranks its value, or raises its error on all.

    All ranks must make the same calls in the same order. Before there is a process group, under torchrun and SLURM
    one is made, which Lightning then uses; where Lightning starts the processes, the first one goes ahead, and those
    that it starts later find its values.

    Args:
        function: its value must be small (64 KiB) and can be pickled: a path, not the data.
        accelerator: "cuda", "cpu" or "auto", that of the run: decides the process group's backend.
        timeout: how long the others wait.

    Raises:
        Exception: what the function raised.
    """
    if is_lightning_child() and not dist.is_initialized():
        return _value(_heard())
    if world_size() == 1:
        try:
            value = function()
        except Exception as error:
            _tell(_pickled(None, error))
            raise
        _tell(_pickled(value, None))
        return value
    start_process_group(accelerator)
    failure: Exception | None = None
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [_pickled(function(), None)]
        except Exception as error:
            failure, outcome = error, [_pickled(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=cpu_group(timeout), device=torch.device("cpu"))
    if failure is not None:
        raise failure  # it has its traceback
    return _value(outcome[0])


def from_all_ranks(value: T, timeout: timedelta = timedelta(hours=1)) -> list[T]:
    """Every rank's value, on all of them; there must be a process group, or a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=cpu_group(timeout))
    return values


def start_process_group(accelerator: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> None:
    """Makes the process group of torchrun or SLURM as Lightning would, which uses it. Does nothing if there is one."""
    environment = cluster_environment()
    if dist.is_initialized() or environment is None:
        return
    is_cuda = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
        environment.main_address,
        str(environment.main_port),
    )
    device = None
    if is_cuda:
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        device_id=device,
        timeout=timeout,
    )


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Ends the process group, whoever made it, when all ranks leave the block: at its end or by SystemExit, which is
    how a signal stops them. Not after an error, since others may be waiting for this rank: they would be for longer.

    Without this a run that went well may abort at the very end ("terminate called without an active exception"):
    threads of gloo's give back tensors, for which they need Python, which no longer lets them when it is ending.
    """
    try:
        yield
    except SystemExit:
        _end_process_group()
        raise
    _end_process_group()


def _end_process_group() -> None:
    if dist.is_available() and dist.is_initialized():
        _cpu_group.cache_clear()
        dist.destroy_process_group()
        # A group ends its threads when nothing refers to it any more, but caches of DTensor's and default arguments of
        # torch.distributed.nn may. What its threads still give back they do now, while this one leaves Python to them.
        time.sleep(0.5)


@lru_cache(maxsize=8)
def _cpu_group(world: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timeout)


def cpu_group(timeout: timedelta) -> dist.ProcessGroup:
    """All ranks, for messages between CPUs that nothing on the GPU waits for; NCCL would end a long wait."""
    assert dist.group.WORLD is not None
    return _cpu_group(dist.group.WORLD, timeout)


def _tell(outcome: bytes) -> None:
    """Leaves what rank 0 decided to processes that Lightning may start later."""
    global _decisions
    if cluster_environment() is None and not dist.is_initialized():
        os.environ[_DECISION.format(_decisions)] = b64encode(outcome).decode()
        _decisions += 1


def _heard() -> bytes:
    """What rank 0 decided before it started this process."""
    global _decisions
    name = _DECISION.format(_decisions)
    if name not in os.environ:
        raise RuntimeError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, but neither torchrun, SLURM nor Lightning started this "
            "process; start the run with torchrun."
        )
    _decisions += 1
    return b64decode(os.environ[name])


def _pickled(value: Any, error: Exception | None) -> bytes:
    try:
        data = pickle.dumps((value, error))
        pickle.loads(data)  # not every error can be made again
    except Exception:
        if error is None:
            raise
        data = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    if len(data) > _LARGEST_DECISION:
        raise ValueError(
            f"function: got a value of {len(data)} bytes, expected at most {_LARGEST_DECISION}; return a path."
        )
    return data


def _value(outcome: bytes) -> Any:
    value, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return value
