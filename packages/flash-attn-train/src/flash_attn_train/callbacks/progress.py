"""A progress bar on a terminal; elsewhere, a line for each record."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from flash_attn_train.callbacks.metrics import Metrics
from flash_attn_train.console import duration, is_terminal, say


class Progress(pl.callbacks.ProgressBar):
    """Shows what ``metrics`` measures, with the time left. Must come after it in the trainer's callbacks.

    Only the first process shows anything: Lightning disables the bars of the others.
    """

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics
        self._enabled = True
        self._bar: tqdm | None = None
        self._shown: dict[str, float] = {}
        self._start = (0, 0.0)  # step and time

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = (trainer.global_step, time.perf_counter())
        self._shown = self.metrics.training
        if self._enabled and is_terminal():
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc="training",
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                leave=False,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
        record = self.metrics.training
        if record is self._shown:
            return
        self._shown = record
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([f"loss {record['train/loss']:.3f}", *_speed(record)]))
        else:
            parts = [
                f"step {trainer.global_step}/{trainer.max_steps}",
                f"loss {record['train/loss']:.3f}",
                f"lr {record['lr']:.1e}",
                *_speed(record),
                f"ETA {self._eta(trainer)}",
            ]
            say("  ".join(parts))

    def _eta(self, trainer: pl.Trainer) -> str:
        first_step, started = self._start
        per_step = (time.perf_counter() - started) / (trainer.global_step - first_step)
        return duration(per_step * (trainer.max_steps - trainer.global_step))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled:
            parts = [
                f"step {trainer.global_step}/{trainer.max_steps}",
                *describe_validation(self.metrics.validation),
            ]
            say("  ".join(parts))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _speed(record: Mapping[str, float]) -> list[str]:
    """Speed in words, such as ``12,345 tokens/s`` and ``MFU 45.6 %``."""
    parts = [
        f"{record[f'{unit}_per_s']:,.0f} {unit}/s"
        for unit in ("tokens", "samples")
        if f"{unit}_per_s" in record
    ]
    return [*parts, f"MFU {record['mfu']:.1%}"] if "mfu" in record else parts


def describe_validation(record: Mapping[str, float]) -> list[str]:
    """A validation record in words, the loss first."""
    formats = {
        "val/loss": "validation loss {:.3f}",
        "val/perplexity": "perplexity {:.1f}",
        "val/bits_per_byte": "{:.3f} bits/byte",
        "val/accuracy": "accuracy {:.2%}",
    }
    return [text.format(record[name]) for name, text in formats.items() if name in record]
