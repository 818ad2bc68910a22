"""How long training waits for its batches."""

from __future__ import annotations

import time
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler


class DataWaitProfiler(PassThroughProfiler):
    """Lightning tells its profiler when it starts and stops to wait for the next training batch; this adds it up."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._started = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._started


def watch_data_wait(trainer: pl.Trainer) -> DataWaitProfiler | None:
    """Puts the profiler into a trainer that has no other. None if it has one."""
    holder = cast(Any, trainer)  # its type does not declare the attribute
    profiler = holder.profiler
    if isinstance(profiler, DataWaitProfiler):
        return profiler
    if type(profiler) is not PassThroughProfiler:
        return None
    watch = DataWaitProfiler()
    holder.profiler = watch
    return watch
