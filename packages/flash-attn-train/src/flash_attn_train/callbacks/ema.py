"""Averaged weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flash_attn_train.console import say
from flash_attn_train.errors import CheckpointError, ConfigError

# Of a checkpoint: averaged weights under their names in "state_dict", which has the weights that training goes on from.
EMA_KEY = "ema_state_dict"


class EMA(pl.Callback):
    """Exponential moving average of the trained weights: ``average += (1 - d) * (weights - average)``.

    Averages are kept in float32 on the device (4 bytes per parameter; with FSDP2 each process keeps those of its
    shards). Validation runs on them; so does what comes after training, such as the sample. Checkpoints have both, and
    a resumed run goes on with the same bits. Nothing waits for the device.

    (Lightning's WeightAveraging keeps the average on the CPU unless told otherwise, copies the whole module, waits for
    the device in every update, knows no shards and no warmup, and saves the average in the place of the weights.)

    Args:
        decay: d, from which the average covers about the last 1 / (1 - d) updates.
        warmup: d is at most (1 + n) / (10 + n) after n updates, so that the first weights are soon forgotten.
        every_n_steps: optimizer steps between updates.
    """

    def __init__(self, decay: float = 0.9999, *, warmup: bool = True, every_n_steps: int = 1) -> None:
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self._updates = 0
        self._step = 0
        self._names: list[str] = []
        self._weights: list[nn.Parameter] = []
        self._averages: list[Tensor] = []  # local shards of DTensors
        self._restored: dict[str, Tensor] | None = None
        self._loaded = False
        self._kept: list[Tensor] | None = None  # the weights, while the averages are in their place

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates = state_dict["updates"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded, self._restored = True, checkpoint.get(EMA_KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: some strategies restore the weights after on_fit_start.
        strategy = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ConfigError(
                "callbacks.ema.enabled: got true with tensor parallelism, expected false. Use another strategy."
            )
        by_parameter: dict[int, str] = {}
        for name, tensor in pl_module.state_dict(keep_vars=True).items():
            by_parameter.setdefault(id(tensor), name)
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self._weights, self._names = trained, [by_parameter[id(p)] for p in trained]
        if self._loaded and self._restored is None and trainer.is_global_zero:
            say("the checkpoint has no averaged weights: the average starts from its weights")
        self._averages = [_start(p, n, self._restored) for p, n in zip(trained, self._names, strict=True)]
        self._restored = None
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            weights = [_local(p).float() for p in self._weights]
            torch._foreach_lerp_(self._averages, weights, 1.0 - self.decay_after(self._updates))
            self._updates += 1

    def decay_after(self, updates: int) -> float:
        """What share of the average the next update keeps."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap_in()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap_out()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Before any checkpoint of the interrupted state: Lightning calls checkpoint callbacks last.
        self._swap_out()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # After the last checkpoint.
        self._swap_in()
        self._kept = None

    @torch.no_grad()
    def _swap_in(self) -> None:
        if self._averages and self._kept is None:
            self._kept = [_local(p).clone() for p in self._weights]
            for weight, average in zip(self._weights, self._averages, strict=True):
                _local(weight).copy_(average)

    @torch.no_grad()
    def _swap_out(self) -> None:
        if self._kept is not None:
            for weight, kept in zip(self._weights, self._kept, strict=True):
                _local(weight).copy_(kept)
            self._kept = None

    @torch.no_grad()
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._averages:
            return
        # All processes gather together; the first one writes.
        averages: dict[str, Tensor] = {}
        for name, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            whole = _whole(weight, average)
            if trainer.is_global_zero:
                # A copy where it is not gathered: a writer that works in the background must not see later updates.
                averages[name] = whole.cpu() if isinstance(weight, DTensor) else average.clone()
        checkpoint[EMA_KEY] = averages


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(weight: Tensor, average: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return average
    sharded = DTensor.from_local(
        average, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
    return sharded.full_tensor()


def _start(weight: nn.Parameter, name: str, restored: dict[str, Tensor] | None) -> Tensor:
    if restored is None:
        return _local(weight).float().clone()
    average = restored.get(name)
    if average is None or average.shape != weight.shape:
        got = "nothing" if average is None else f"shape {tuple(average.shape)}"
        raise CheckpointError(
            f"averaged weights of {name}: got {got}, expected shape {tuple(weight.shape)}. The checkpoint is of "
            "another model; leave resume out to start a new run."
        )
    average = average.to(weight.device, torch.float32)
    if isinstance(weight, DTensor):
        return distribute_tensor(average, weight.device_mesh, weight.placements).to_local()
    return average.clone()
