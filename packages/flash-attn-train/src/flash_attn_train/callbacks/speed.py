"""Time per step, speed per device, MFU, wait for data, peak memory."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from flash_attn_train.callbacks.data_wait import DataWaitProfiler, watch_data_wait
from flash_attn_train.callbacks.measurement import Measurement, Window
from flash_attn_train.callbacks.model_facts import ModelFacts
from flash_attn_train.console import say
from flash_attn_train.flops import peak_tflops


class SpeedMonitor(Measurement):
    """Adds to the training record, of the time since the record before, without validation:

    - ``step_time_s``: seconds per optimizer step.
    - ``tokens_per_s_per_device`` (``samples_per_s_per_device`` for images).
    - ``data_wait``: share of the time in which this process waited for the next batch; left out if the trainer has a
      profiler.
    - ``mfu``: model FLOPs per second over what the devices can do, see :mod:`flash_attn_train.flops` for the
      convention; left out if either is not known.
    - ``peak_memory_gib``: most memory that torch had in use on this process's GPU since the run started.

    Args:
        facts: counts the FLOPs of a sample.
        peak_tflops: of one device; None: by its name.
    """

    def __init__(self, facts: ModelFacts, peak_tflops: float | None = None) -> None:
        self.facts = facts
        self.peak_tflops = peak_tflops
        self._wait: DataWaitProfiler | None = None
        self._waited = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._wait = watch_data_wait(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            name = torch.cuda.get_device_name(device)
            if self.peak_tflops is None:
                self.peak_tflops = peak_tflops(name, str(trainer.precision))
            if self.peak_tflops is None and trainer.is_global_zero:
                say(f"no MFU: the peak of {name} is not known; callbacks.speed.peak_tflops=... sets it")
        self._waited = 0.0 if self._wait is None else self._wait.seconds

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> dict[str, float]:
        unit, amount = ("tokens", window.tokens) if window.tokens else ("samples", window.samples)
        values = {
            "step_time_s": window.seconds / window.steps,
            f"{unit}_per_s_per_device": amount / window.seconds / trainer.world_size,
        }
        if self._wait is not None:
            values["data_wait"] = (self._wait.seconds - self._waited) / window.seconds
            self._waited = self._wait.seconds
        flops = self.facts.flops_per_sample
        if flops is not None and self.peak_tflops is not None:
            peak = self.peak_tflops * 1e12 * trainer.world_size
            values["mfu"] = window.samples * flops / window.seconds / peak
        device = trainer.strategy.root_device
        if device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values
