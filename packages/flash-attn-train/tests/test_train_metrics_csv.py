"""The CSV log."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_attn_train.loggers import MetricsCSV, read_metrics
from pytorch_lightning.utilities.rank_zero import rank_zero_only

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


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"3,\0\0\n\0\0\n"])
def test_zeros_that_a_power_cut_leaves_at_the_end(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "metrics.csv"
    log = MetricsCSV(file, COLUMNS)
    for step in (1, 2):
        log.log_metrics({"loss": float(step)}, step=step)
    with open(file, "ab") as unwritten:
        unwritten.write(tail)
    assert [row["step"] for row in read_metrics(file)] == [1, 2]
    MetricsCSV(file, COLUMNS, resume_step=2).log_metrics({"loss": 3.0}, step=3)
    assert [row["loss"] for row in read_metrics(file)] == [1, 2, 3]


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    MetricsCSV(file, COLUMNS).log_metrics({"loss": 1.0}, step=1)
    MetricsCSV(file, COLUMNS)
    assert read_metrics(file) == []


def test_new_metric_adds_a_column(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    log = MetricsCSV(file, COLUMNS)
    log.log_metrics({"loss": 0.1 + 0.2, "speed": 1e-17}, step=1)
    log.log_metrics({"loss": 2.0, "val/loss": 3.0}, step=2)
    log.log_metrics({"speed": 4.0}, step=3)
    assert file.read_text().splitlines() == [
        "step,loss,speed,val/loss",
        "1,0.30000000000000004,1e-17,",
        "2,2.0,,3.0",
        "3,,4.0,",
    ]
    # Resumed with other columns: those of the file stay where they are.
    MetricsCSV(file, ("speed", "norm"), resume_step=2).log_metrics({"norm": 5.0, "loss": 6.0}, step=3)
    assert file.read_text().splitlines() == [
        "step,loss,speed,val/loss,norm",
        "1,0.30000000000000004,1e-17,,",
        "2,2.0,,3.0,",
        "3,6.0,,,5.0",
    ]


def test_only_the_first_process_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log = MetricsCSV(tmp_path / "metrics.csv", COLUMNS)
    log.log_metrics({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []
