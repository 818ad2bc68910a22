"""Sizes of the model, for the reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytorch_lightning as pl

from flash_attn_train.atomic import atomic_write
from flash_attn_train.flops import count_parameters, flops_per_sample


class ModelFacts(pl.Callback):
    """Counts parameters and FLOPs of the model once it exists, and writes them to ``model.json``.

    Args:
        file: to write.
        target_share: see :func:`flash_attn_train.flops.flops_per_sample`.

    Attributes:
        flops_per_sample: of a sample in training; None if it is not known (yet).
    """

    def __init__(self, file: Path, *, target_share: float = 1.0) -> None:
        self.file, self.target_share = file, target_share
        self.flops_per_sample: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model, tokens = pl_module.model, int(pl_module.tokens_per_sample)  # type: ignore[arg-type]
        self.flops_per_sample = flops_per_sample(model, tokens, target_share=self.target_share)  # type: ignore[arg-type]
        if not trainer.is_global_zero:
            return
        facts = {
            "parameters": dataclasses.asdict(count_parameters(model)),  # type: ignore[arg-type]
            "tokens_per_sample": tokens,
            "flops_per_sample": self.flops_per_sample,
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
        }
        with atomic_write(self.file) as file:
            file.write((json.dumps(facts, indent=2) + "\n").encode())
