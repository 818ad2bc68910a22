"""The callbacks that a config asks for, in the order in which they must be called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl

from flash_attn_train.callbacks.causality import CausalityMonitor
from flash_attn_train.callbacks.ema import EMA
from flash_attn_train.callbacks.final_validation import FinalValidation
from flash_attn_train.callbacks.gpu_affinity import GpuAffinity
from flash_attn_train.callbacks.loss_scale import LossScaleMonitor
from flash_attn_train.callbacks.measurement import Measurement
from flash_attn_train.callbacks.metrics import Metrics
from flash_attn_train.callbacks.model_facts import ModelFacts
from flash_attn_train.callbacks.model_table import ModelTable
from flash_attn_train.callbacks.nan_guard import NaNGuard
from flash_attn_train.callbacks.norms import NormMonitor
from flash_attn_train.callbacks.progress import Progress
from flash_attn_train.callbacks.speed import SpeedMonitor
from flash_attn_train.configs.callbacks import CallbacksConfig
from flash_attn_train.configs.task import LanguageModelConfig, MaskedLMConfig, TaskConfig
from flash_attn_train.errors import ConfigError


@dataclass(frozen=True)
class WatchedRun:
    """What callbacks must know of a run besides their own options.

    Attributes:
        folder: of the run, for the files that they write: ``model.json``, and ``nan_batch.pt`` if it comes to that.
        task: what is trained.
        every_n_steps: steps between training records.
        nan: trainer.nan, "stop" or "skip".
        val_bytes_per_token: see :class:`Metrics`; None where there is no text, or bits per byte are not wanted.
    """

    folder: Path
    task: TaskConfig
    every_n_steps: int
    nan: str = "stop"
    val_bytes_per_token: float | None = None


def build_callbacks(config: CallbacksConfig, run: WatchedRun) -> tuple[Metrics, list[pl.Callback]]:
    """All callbacks of a run but the one that writes checkpoints, and of these the one that measures.

    Raises:
        ConfigError: a callback has no meaning for the task.
    """
    if config.causality.enabled and not isinstance(run.task, LanguageModelConfig):
        raise ConfigError(
            "callbacks.causality.enabled: got true, expected false: of all tasks, only language_model predicts "
            "from the past alone."
        )
    # The head is computed for the hidden tokens alone.
    target_share = run.task.mask_probability if isinstance(run.task, MaskedLMConfig) else 1.0
    facts = ModelFacts(run.folder / "model.json", target_share=target_share)
    guard = NaNGuard(
        run.folder,
        mode=run.nan,
        every_n_steps=run.every_n_steps,
        max_skipped_in_a_row=config.nan_guard.max_skipped_in_a_row,
    )
    measurements: list[Measurement] = [guard]
    if config.speed.enabled:
        measurements.append(SpeedMonitor(facts, config.speed.peak_tflops))
    if config.loss_scale:
        measurements.append(LossScaleMonitor())
    if config.norms.enabled:
        measurements.append(NormMonitor(every_n_steps=run.every_n_steps, per_layer=config.norms.per_layer))
    metrics = Metrics(
        every_n_steps=run.every_n_steps,
        measurements=measurements,
        val_bytes_per_token=run.val_bytes_per_token,
    )
    # The guard comes after the record, which shows the bad loss, and after the norms, whose gradients it may take away.
    ordered: list[pl.Callback] = [*_at_start(config), facts, *_averages(config)]
    ordered += [*(m for m in measurements if m is not guard), metrics, Progress(metrics), guard]
    ordered += [*_at_validation(config), FinalValidation()]
    return metrics, ordered


def _at_start(config: CallbacksConfig) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = [GpuAffinity()] if config.gpu_affinity else []
    if config.model_summary:
        callbacks.append(ModelTable())
    return callbacks


def _averages(config: CallbacksConfig) -> list[pl.Callback]:
    ema = config.ema
    return [EMA(ema.decay, warmup=ema.warmup, every_n_steps=ema.every_n_steps)] if ema.enabled else []


def _at_validation(config: CallbacksConfig) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = []
    if config.causality.enabled:
        callbacks.append(CausalityMonitor(config.causality.on_leak))
    early = config.early_stopping
    if early.enabled:
        stopping = pl.callbacks.EarlyStopping(
            early.monitor,
            mode=early.mode,
            patience=early.patience,
            min_delta=early.min_delta,
            check_on_train_epoch_end=False,
        )
        callbacks.append(stopping)
    return callbacks
