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

    Args:
        path: the file; continued if it exists.
        columns: names of the metrics, without the first column, ``step``.
        resume_step: rows of later steps are dropped.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if path.exists() else []
        with atomic_write(path) as file:
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("step", *columns))
            writer.writerows(self._values(row["step"], row) for row in kept)
            file.write(text.getvalue().encode())

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
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(self._values(step or 0, metrics))

    def _values(self, step: float, metrics: Mapping[str, float]) -> list[Any]:
        unknown = set(metrics) - {*self.columns, "step"}
        if unknown:
            raise ValueError(f"metrics: got {sorted(unknown)}, expected only {list(self.columns)}.")
        return [int(step), *(metrics.get(column, "") for column in self.columns)]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, each without the metrics that it does not have.

    A last line that a killed process left unfinished (no line end) is dropped.
    """
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [
        {name: float(value) for name, value in row.items() if value not in ("", None)}
        for row in csv.DictReader(io.StringIO(complete))
    ]
