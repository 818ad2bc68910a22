"""The Lightning data module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from flash_attn_train.data.batches import CountFrom, TrainBatches, ValidationBatches


class TokenDataModule(pl.LightningDataModule):
    """Training batches without end, starting at the trainer's step, and validation batches.

    Args:
        train, validation: token ids, (n,), see :func:`flash_attn_train.data.token_file.open_token_file`.
        seqlen: context length in tokens.
        batch_size: sequences per forward pass.
        val_sequences: most sequences per validation; None for all.
        num_workers: loader processes; 0 assembles batches in the training process.
    """

    def __init__(
        self,
        train: np.ndarray,
        validation: np.ndarray,
        *,
        seqlen: int,
        batch_size: int,
        seed: int = 0,
        val_sequences: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train_batches = TrainBatches(train, seqlen=seqlen, batch_size=batch_size, seed=seed)
        self.validation_batches = ValidationBatches(
            validation, seqlen=seqlen, batch_size=batch_size, max_sequences=val_sequences
        )
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        first = trainer.global_step * trainer.accumulate_grad_batches
        return self._loader(self.train_batches, sampler=CountFrom(first))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation_batches)

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,  # the dataset's items are batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Without its own generator a loader draws from the global one, and the dropout masks of a run
            # would depend on how often loaders were started.
            generator=torch.Generator().manual_seed(0),
            **options,
        )
