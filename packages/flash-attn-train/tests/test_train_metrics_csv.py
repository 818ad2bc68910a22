"""The CSV log."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_attn_train.loggers import MetricsCSV, read_metrics

COLUMNS = ("loss", "speed")


def test_rows_are_appended_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    log = MetricsCSV(file, COLUMNS)
    log.log_metrics({"loss": 0.1 + 0.2}, step=1)
    assert file.read_text() == "step,loss,speed\n1,0.30000000000000004,\n"
    log.log_metrics({"speed": 5.0}, step=2)
    assert read_metrics(file) == [{"step": 1.0, "loss": 0.1 + 0.2}, {"step": 2.0, "speed": 5.0}]


def test_resuming_keeps_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    log = MetricsCSV(file, COLUMNS)
    for step in range(1, 6):
        log.log_metrics({"loss": float(step), "speed": step}, step=step)
    before = file.read_text().splitlines()
    with open(file, "a") as unfinished:
        unfinished.write("6,6.")
    MetricsCSV(file, COLUMNS, resume_step=3).log_metrics({"loss": 40.0}, step=4)
    assert file.read_text().splitlines() == [*before[:4], "4,40.0,"]


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    MetricsCSV(file, COLUMNS).log_metrics({"loss": 1.0}, step=1)
    MetricsCSV(file, COLUMNS)
    assert read_metrics(file) == []


def test_unknown_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got \\['los'\\], expected only \\['loss', 'speed'\\]"):
        MetricsCSV(tmp_path / "metrics.csv", COLUMNS).log_metrics({"los": 1.0}, step=1)
