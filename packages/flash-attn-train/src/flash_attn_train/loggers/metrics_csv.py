"""A CSV logger that a resumed run can continue.

Lightning's CSVLogger deletes the file of an earlier run in the same folder. This one appends; on resuming it
drops the rows after the step of the checkpoint, which are going to be computed again.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from flash_attn_train.atomic import atomic_write


class MetricsCSV(Logger):
    """One row per logged step; a column is empty where the metric was not logged at that step.

    Args:
        path: the file; continued if it exists.
        columns: names of the metrics, without the first column, ``step``.
        resume_step: rows of later steps are dropped.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        rows = _complete_lines(path)[1:] if resume_step > 0 and path.exists() else []
        kept = [row for row in rows if int(row.split(",")[0]) <= resume_step]
        with atomic_write(path) as file:
            file.write("\n".join([",".join(("step", *columns)), *kept, ""]).encode())

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
        unknown = set(metrics) - set(self.columns)
        if unknown:
            raise ValueError(f"metrics: got {sorted(unknown)}, expected only {list(self.columns)}.")
        row = [step or 0, *(metrics.get(column, "") for column in self.columns)]
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, each without the metrics that it does not have.

    A last line that a killed process left unfinished (no line end) is dropped.
    """
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(_complete_lines(path))
    ]


def _complete_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
