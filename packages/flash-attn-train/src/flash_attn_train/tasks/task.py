"""What every task is: a model, a loss, an optimizer, and how a batch becomes numbers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from flash_attn_train.configs import TrainConfig
from flash_attn_train.distributed import clip_gradients, distribute_optimizer, scale_gradients
from flash_attn_train.metrics import build_metrics
from flash_attn_train.models import DataSizes
from flash_attn_train.optim import WarmupPlateau, build_optimizer, build_scheduler
from flash_attn_train.tasks.initial_model import initial_model
from flash_attn_train.tasks.target_mean import TargetMean

Batch = dict[str, Any]


@dataclass(frozen=True)
class StepOutput:
    """What a batch gave.

    Attributes:
        loss: mean over the targets that count, in nats.
        num_targets: how many count, int64.
        logits: of the targets, (..., classes); None where they are never all in memory.
        labels: of the targets, (...) int64, -100 where one does not count; or probabilities (..., classes).
    """

    loss: Tensor
    num_targets: Tensor
    logits: Tensor | None
    labels: Tensor


class Task(pl.LightningModule):
    """A model in training. Subclasses say what the loss of a batch is.

    Args:
        config: the whole (resolved) config of the run.
        sizes: what the data decide about the model.
    """

    model: nn.Module
    # Whether samples differ in how many of their positions are targets, as with hidden tokens.
    targets_vary: ClassVar[bool] = False

    def __init__(self, config: TrainConfig, sizes: DataSizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.grad_norm: Tensor | None = None  # of the last optimizer step, before clipping
        # What the mean over forward passes and processes of the last step's losses is to be multiplied by.
        self.loss_factor: Tensor | None = None
        self._target_mean = TargetMean()
        self.val_metrics = build_metrics(config.metrics, config.task)

    @property
    @abstractmethod
    def tokens_per_sample(self) -> int:
        """Positions that the model computes for a sample: tokens, or patches and the class token."""

    @abstractmethod
    def step(self, batch: Batch) -> StepOutput:
        """Forward pass and loss."""

    def configure_model(self) -> None:
        # Lightning calls this at the start of every fit and validation, after the processes know each other.
        if hasattr(self, "model"):
            return
        self.model = initial_model(self.config, self.sizes, self.device_mesh)

    def on_train_start(self) -> None:
        self._target_mean = TargetMean()  # an interrupted fit may have left some passes of a step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.step(batch)
        if not self.targets_vary:
            return output.loss
        return self._target_mean.loss_of_pass(output.loss, output.num_targets, batch["labels"].numel())

    def on_after_backward(self) -> None:
        if not self.targets_vary:
            return
        self.loss_factor = self._target_mean.factor_of_step(self.trainer)
        if self.loss_factor is not None:
            scale_gradients(self.model, self.loss_factor)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self.step(batch))

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.val_metrics.compute().items()}
        self.log_dict(values, logger=False)
        self.val_metrics.reset()
        # Lightning shows the loss to a plateau schedule after the checkpoints of this validation, which would lack it.
        for scheduler in (entry.scheduler for entry in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, WarmupPlateau):
                scheduler.step(values["val/loss"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # The fused step un-scales fp16 gradients itself, which is after clipping: too late.
        fused = self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self.config.optimizer, self.model, fused=fused)
        optimizer = distribute_optimizer(optimizer, self.trainer.strategy)
        trainer = self.config.trainer
        scheduler = build_scheduler(
            self.config.scheduler,
            optimizer,
            trainer.max_steps,
            val_every_n_steps=trainer.val_every_n_steps,
        )
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": scheduler})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping neither returns the norm nor accepts a fused optimizer under autocast.
        self.grad_norm = clip_gradients(self.model, gradient_clip_val or float("inf"), self.device_mesh)
