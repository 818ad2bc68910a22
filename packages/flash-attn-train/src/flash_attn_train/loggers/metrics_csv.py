"""A CSV logger that a resumed run can continue.

Lightning's CSVLogger deletes the file of an earlier run in the same folder. This one appends; on resuming it
drops the rows after the step of the checkpoint, which are going to be computed again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from flash_attn_train.atomic import atomic_write


class MetricsCSV(Logger):
    """One row per logged step; a column is empty where the metric was not logged at that step.

    A metric that comes for the first time adds a column. Only the process of rank 0 touches the file.

    Args:
        path: the file; continued if it exists.
        columns: names of the first metrics, without the first column, ``step``; those in the file come before others.
        resume_step: rows of later steps are dropped.
    """

    def __init__(self, path: Path, columns: tuple[str, ...] = (), *, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        self._start(resume_step)

    @rank_zero_only
    def _start(self, resume_step: int) -> None:
        rows: list[dict[str, str]] = []
        if resume_step > 0 and self.path.exists():
            reader = csv.DictReader(_complete_lines(self.path))
            rows = [row for row in reader if int(row["step"]) <= resume_step]
            before = [name for name in reader.fieldnames or () if name != "step"]
            self.columns = (*before, *(name for name in self.columns if name not in before))
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.path) as file:
            text = io.TextIOWrapper(file, newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("step", *self.columns))
            writer.writerows([row.get(name) or "" for name in ("step", *self.columns)] for row in rows)
            text.flush()
            text.detach()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has the whole config in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        new = [name for name in metrics if name not in self.columns]
        if new:
            rows = list(csv.DictReader(_complete_lines(self.path)))
            self.columns = (*self.columns, *new)
            self._rewrite(rows)
        row = [step or 0, *(metrics.get(column, "") for column in self.columns)]
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, each without the metrics that it does not have.

    A last line that a killed process left unfinished (no line end) is dropped, and what a power cut left unwritten
    (zeros).
    """
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(_complete_lines(path))
    ]


def _complete_lines(path: Path) -> list[str]:
    text = path.read_text().partition("\0")[0]
    return text[: text.rfind("\n") + 1].splitlines()
