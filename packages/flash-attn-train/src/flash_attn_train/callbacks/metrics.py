"""Loss, learning rate, gradient norm, speed and validation quality, at the optimizer step they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from flash_attn_train.callbacks.measurement import Measurement, Window, is_record_due
from flash_attn_train.callbacks.processes import data_parallel_group, is_first_of_group
from flash_attn_train.callbacks.stopwatch import Stopwatch
from flash_attn_train.metrics import Seen, bits_per_byte


class Metrics(pl.Callback):
    """Measures and sends to the trainer's loggers. Step n is the state after n optimizer steps.

    Between training records nothing waits for the device. The training loss is that of the recorded step alone (mean
    over its targets, of all forward passes and processes), so a resumed run logs the same numbers as an uninterrupted
    one. The gradient norm is the one before clipping. Speed is what all processes together have trained on per second
    since the record before, leaving out validation. Tokens, or samples of images, are counted from the first session
    on.

    Validation records hold whatever the task logged under a name that starts with "val/".

    (Lightning's LearningRateMonitor would make records of its own, under other steps; its ThroughputMonitor waits for
    the device in every batch, and takes the speed of sparse matrices for the peak of some devices.)

    Args:
        every_n_steps: steps between training records.
        measurements: callbacks of the trainer that add to the training records.
        val_bytes_per_token: length of the held-out text in bytes over its length in tokens, for bits per byte, which
            compares models with different tokenizers: loss / ln 2 / bytes per token. None: not computed.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        measurements: Sequence[Measurement] = (),
        val_bytes_per_token: float | None = None,
    ) -> None:
        self.every_n_steps, self.measurements = every_n_steps, measurements
        self.val_bytes_per_token = val_bytes_per_token
        self.training: dict[str, float] = {}  # the newest records, for display
        self.validation: dict[str, float] = {}
        self._unit = "tokens"  # what is counted; "samples" for images
        self._seen: Seen | None = None
        self._totals = self._first_totals = {"tokens": 0, "samples": 0}
        self._stopwatch = Stopwatch()
        self._step = 0
        self._at_record = (0, 0.0, self._totals)  # step, seconds, totals
        self._rates: dict[str, float] = {}
        self._loss: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that this session has trained on, all processes together; 0 for images."""
        return self._totals["tokens"] - self._first_totals["tokens"]

    @property
    def samples(self) -> int:
        """Samples that this session has trained on, all processes together."""
        return self._totals["samples"] - self._first_totals["samples"]

    @property
    def seconds(self) -> float:
        """Seconds that this session has spent on training, leaving out validation."""
        return self._stopwatch.seconds

    def state_dict(self) -> dict[str, Any]:
        # Called on all processes together.
        return {} if self._seen is None else {"seen": self._seen.totals()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals = self._first_totals = state_dict["seen"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        group = data_parallel_group(trainer)
        self._seen = Seen(process_group=group).to(pl_module.device)
        self._seen.restore(self._totals, is_first=is_first_of_group(group))
        self._first_totals = self._totals
        self._step = trainer.global_step
        self._at_record = (self._step, 0.0, self._totals)
        self._stopwatch.start()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        groups = optimizer.param_groups
        # The optimizer's rate is that of groups without a name, see flash_attn_train.optim.param_groups.
        plain = next((group for group in groups if "name" not in group), groups[0])
        named = {f"lr/{group['name']}": float(group["lr"]) for group in groups if "name" in group}
        self._rates = {"lr": float(plain["lr"]), **named}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._seen is not None
        self._seen.update(batch)
        self._unit = _unit_of(batch)
        # Lightning has divided it by the number of forward passes of a step already.
        self._loss = outputs["loss"] if self._loss is None else self._loss + outputs["loss"]
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if is_record_due(trainer, self._step, self.every_n_steps):
            self._record(trainer, pl_module, self._loss)
        self._loss = None

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._seen is not None
        loss = trainer.strategy.reduce(loss, reduce_op="mean")
        factor = getattr(pl_module, "loss_factor", None)
        values = {"train/loss": float(loss if factor is None else loss * factor), **self._rates}
        grad_norm = getattr(pl_module, "grad_norm", None)
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        self._totals = self._seen.totals()
        last_step, last_seconds, last_totals = self._at_record
        self._at_record = (self._step, self.seconds, self._totals)
        window = Window(
            seconds=self.seconds - last_seconds,
            steps=self._step - last_step,
            samples=self._totals["samples"] - last_totals["samples"],
            tokens=self._totals["tokens"] - last_totals["tokens"],
        )
        amount = getattr(window, self._unit)
        values = {**self._counts(), **values, f"{self._unit}_per_s": amount / window.seconds}
        for measurement in self.measurements:
            values |= measurement.measure(trainer, pl_module, window)
        self.training = values
        self._log(trainer, values)

    def _counts(self) -> dict[str, float]:
        return {self._unit: self._totals[self._unit]}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopwatch.stop()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._unit = _unit_of(batch)  # there may have been no training yet

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._seen is not None:
            self._totals = self._seen.totals()
        values = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        if self.val_bytes_per_token is not None and "val/loss" in values:
            values["val/bits_per_byte"] = bits_per_byte(values["val/loss"], self.val_bytes_per_token)
        self.validation = {**self._counts(), **values}
        self._log(trainer, self.validation)
        if trainer.state.fn == TrainerFn.FITTING:
            self._stopwatch.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopwatch.stop()

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)


def _unit_of(batch: Any) -> str:
    return "tokens" if "input_ids" in batch else "samples"
