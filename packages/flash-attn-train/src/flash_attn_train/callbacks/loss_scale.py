"""The factor of the loss in fp16 training."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.plugins import MixedPrecision

from flash_attn_train.callbacks.measurement import Measurement, Window


class LossScaleMonitor(Measurement):
    """Adds ``loss_scale`` to the training record with trainer.precision=16-mixed, and nothing otherwise.

    It is halved where gradients overflow, and that step is skipped: a scale that keeps falling is a run that diverges.
    """

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> dict[str, float]:
        plugin = trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
            return {}
        return {"loss_scale": float(plugin.scaler.get_scale())}
