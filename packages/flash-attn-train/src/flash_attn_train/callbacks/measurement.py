"""A callback whose numbers are part of the training record."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import pytorch_lightning as pl


@dataclass(frozen=True)
class Window:
    """What happened since the training record before.

    Attributes:
        seconds: spent on training, leaving out validation.
        steps: optimizer steps.
        samples: trained on, by all processes.
        tokens: likewise; 0 for images.
    """

    seconds: float
    steps: int
    samples: int
    tokens: int


class Measurement(pl.Callback):
    """Adds columns to the training record that :class:`Metrics` makes, after it has waited for the device."""

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> dict[str, float]:
        """Column -> value. All processes call it together; what the first one returns is logged."""


def is_record_due(trainer: pl.Trainer, step: int, every_n_steps: int) -> bool:
    """Whether there is a training record after optimizer step number ``step``, counted from 1."""
    return step % every_n_steps == 0 or step == trainer.max_steps
