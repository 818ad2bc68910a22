"""Measures time in parts."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds between starts and stops, added up."""

    def __init__(self) -> None:
        self._total = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._total + running

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._total, self._started = self.seconds, None
