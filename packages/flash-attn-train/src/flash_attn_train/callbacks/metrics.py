"""Loss, learning rate, gradient norm, speed and validation quality, at the optimizer step they belong to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

METRICS = (
    "tokens",
    "train/loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
)


class Metrics(pl.Callback):
    """Measures and sends to the trainer's loggers. Step n is the state after n optimizer steps.

    Between logged steps nothing waits for the device. The training loss is that of the logged step alone
    (mean over its forward passes), so a resumed run logs the same numbers as an uninterrupted one. The
    gradient norm is the one before clipping. Speed is tokens trained on per second since the record before,
    leaving out validation.

    Args:
        every_n_steps: steps between training records.
        tokens_per_step: target tokens of one optimizer step.
        val_bytes_per_token: length of the held-out text in bytes over its length in tokens, for bits per
            byte, which compares models with different tokenizers: loss / ln 2 / bytes per token.
    """

    def __init__(self, *, every_n_steps: int, tokens_per_step: int, val_bytes_per_token: float) -> None:
        self.every_n_steps, self.tokens_per_step = every_n_steps, tokens_per_step
        self.val_bytes_per_token = val_bytes_per_token
        self.training: dict[str, float] = {}  # the newest records, for display
        self.validation: dict[str, float] = {}
        self._stopwatch = Stopwatch()
        self._first_step = self._step = 0
        self._at_record = (0, 0.0)  # step and seconds
        self._lr = 0.0
        self._loss: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Target tokens that this process has trained on."""
        return (self._step - self._first_step) * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """Seconds that this process has spent on training, leaving out validation."""
        return self._stopwatch.seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = self._step = trainer.global_step
        self._at_record = (self._step, 0.0)
        self._stopwatch.start()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = outputs["loss"] if self._loss is None else self._loss + outputs["loss"]
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0 or self._step == trainer.max_steps:
            loss = self._loss.item() / trainer.accumulate_grad_batches
            self._record(trainer, pl_module, loss)
        self._loss = None

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: float) -> None:
        last_step, last_seconds = self._at_record
        self._at_record = (self._step, self.seconds)
        self.training = {
            "tokens": self._step * self.tokens_per_step,
            "train/loss": loss,
            "lr": self._lr,
            "grad_norm": float(cast(torch.Tensor, pl_module.grad_norm)),
            "tokens_per_s": (self._step - last_step) * self.tokens_per_step / (self.seconds - last_seconds),
        }
        self._log(trainer, self.training)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopwatch.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics["val/loss"].item()
        self.validation = {
            "tokens": trainer.global_step * self.tokens_per_step,
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bits_per_byte": loss / math.log(2.0) / self.val_bytes_per_token,
        }
        self._log(trainer, self.validation)
        if trainer.state.fn == TrainerFn.FITTING:
            self._stopwatch.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopwatch.stop()

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)


class Stopwatch:
    """Seconds between starts and stops, added up."""

    def __init__(self) -> None:
        self._total = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._total + running

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._total, self._started = self.seconds, None
