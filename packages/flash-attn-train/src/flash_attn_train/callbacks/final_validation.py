"""Validation after the last step, also where that is no multiple of the validation interval."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class FinalValidation(pl.Callback):
    """Asks Lightning to stop at the last step: asked to stop, it validates first."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
