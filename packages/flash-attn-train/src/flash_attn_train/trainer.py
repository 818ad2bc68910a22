"""The Lightning trainer of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from flash_attn_train.callbacks import METRICS, FinalValidation, Metrics, Progress, RunCheckpoint
from flash_attn_train.checkpoints import AtomicCheckpointIO
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.checks import flatten
from flash_attn_train.loggers import MetricsCSV
from flash_attn_train.run_folder import RunFolder


def build_trainer(
    config: TrainConfig, folder: RunFolder, metrics: Metrics, *, data_key: str, first_step: int
) -> pl.Trainer:
    """A trainer for the (resolved) config that measures with ``metrics`` and writes into the run folder.

    Logs of earlier sessions are kept up to ``first_step``.
    """
    settings = config.trainer
    saving = RunCheckpoint(
        folder.last_checkpoint,
        folder.best_checkpoint,
        every_n_steps=config.checkpoint.every_n_steps,
        val_every_n_steps=settings.val_every_n_steps,
        config=flatten(config),
        data_key=data_key,
    )
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=cast(Any, settings.precision),  # a plain str; check_config knows the choices
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val or None,
        # In forward passes, counted over the whole run.
        val_check_interval=settings.val_every_n_steps * settings.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        # What a model keeps from the first validation, such as rotary tables, is used in training, where
        # inference tensors are not allowed.
        inference_mode=False,
        callbacks=[metrics, Progress(metrics), FinalValidation(), saving],
        logger=_loggers(config, folder, first_step),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_autolog_hparams=False,
        default_root_dir=folder.path,
    )


def _loggers(config: TrainConfig, folder: RunFolder, first_step: int) -> list[Logger]:
    loggers: list[Logger] = [MetricsCSV(folder.metrics, METRICS, resume_step=first_step)]
    if config.logging.tensorboard:
        loggers.append(
            TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=first_step + 1)
        )
    return loggers


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences what Lightning says about itself and about choices that are made on purpose here."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.WARNING)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
