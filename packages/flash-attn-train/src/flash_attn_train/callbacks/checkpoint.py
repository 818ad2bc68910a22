"""last.ckpt, to resume from, and best.ckpt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from flash_attn_train.console import say
from flash_attn_train.rng import rng_state, set_rng_state


class RunCheckpoint(pl.callbacks.Checkpoint):
    """Writes ``last`` every so many steps and after the last one, and ``best`` when the validation loss is
    the lowest.

    A checkpoint of a step at which validation is due is written after the validation, so that a resumed run
    neither repeats it nor misses it. (Lightning's ModelCheckpoint writes before, and its resumed run misses
    it.) Checkpoints hold the state of the random generators, the config and the key of the training text.

    Args:
        last, best: files to write.
        every_n_steps, val_every_n_steps: intervals of ``last`` and of the trainer's validation, in optimizer
            steps.
        config: flat dict of plain values, see :func:`flash_attn_train.configs.checks.flatten`.
        data_key: see :class:`flash_attn_train.data.PreparedData`.
    """

    def __init__(
        self,
        last: Path,
        best: Path,
        *,
        every_n_steps: int,
        val_every_n_steps: int,
        config: dict[str, Any],
        data_key: str,
    ) -> None:
        self.last, self.best = last, best
        self.every_n_steps, self.val_every_n_steps = every_n_steps, val_every_n_steps
        self.config, self.data_key = config, data_key
        self.best_loss = math.inf
        self._step = 0
        self._rng_to_restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "rng": rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]
        self._rng_to_restore = state_dict["rng"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["data_key"] = self.data_key

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # As late as possible: setting up the resumed run must not draw from the restored generators.
        if self._rng_to_restore is not None:
            set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        validation_comes = self._step % self.val_every_n_steps == 0 or self._step == trainer.max_steps
        if self._is_due(trainer) and not validation_comes:
            trainer.save_checkpoint(self.last)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the validation before the first step
            return
        loss = trainer.callback_metrics["val/loss"].item()
        if loss < self.best_loss:
            self.best_loss = loss
            trainer.save_checkpoint(self.best)
        if self._is_due(trainer):
            trainer.save_checkpoint(self.last)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # SIGTERM arrives as a SystemExit.
        if isinstance(exception, (KeyboardInterrupt, SystemExit)) and self.last.exists():
            say(f"interrupted at step {trainer.global_step}; resume=true continues from {self.last}")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps
