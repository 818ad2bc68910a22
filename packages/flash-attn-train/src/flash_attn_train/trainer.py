"""The Lightning trainer of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import Strategy

from flash_attn_train.callbacks import RunCheckpoint
from flash_attn_train.checkpoints import AtomicCheckpointIO
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.checks import flatten
from flash_attn_train.distributed import cluster_environment
from flash_attn_train.loggers import build_loggers
from flash_attn_train.run_folder import RunFolder


def build_trainer(
    config: TrainConfig,
    folder: RunFolder,
    callbacks: list[pl.Callback],
    strategy: Strategy,
    *,
    data_key: str,
    first_step: int,
) -> pl.Trainer:
    """A trainer for the (resolved) config that is watched by ``callbacks`` and writes into the run folder.

    Logs of earlier sessions are kept up to ``first_step``.
    """
    settings, options = config.trainer, flatten(config)
    saving = RunCheckpoint(
        folder.last_checkpoint,
        folder.best_checkpoint,
        every_n_steps=config.checkpoint.every_n_steps,
        val_every_n_steps=settings.val_every_n_steps,
        config=options,
        data_key=data_key,
        keep_every_n_steps=config.checkpoint.keep_every_n_steps,
        keep_top_k=config.checkpoint.keep_top_k,
        save_on_error=config.checkpoint.save_on_error,
    )
    environment = cluster_environment()
    plugins: list[Any] = [AtomicCheckpointIO(), *([environment] if environment is not None else [])]
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
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
        use_distributed_sampler=False,  # the data module gives each rank its share
        callbacks=[*callbacks, saving],
        logger=build_loggers(config.logger, folder.path, options=options, first_step=first_step),
        plugins=plugins,
        profiler=_profiler(settings.profiler, folder),
        enable_model_summary=False,
        enable_autolog_hparams=False,
        default_root_dir=folder.path,
    )


def _profiler(name: str, folder: RunFolder) -> Profiler | None:
    """Lightning's profiler of this name, which writes into the run folder."""
    if name == "none":
        return None
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return kinds[name](dirpath=folder.profiler, filename="profile")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences what Lightning says about itself and about choices that are made on purpose here."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*ReduceLROnPlateau conditioned on metric.*")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.WARNING)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
