"""The benchmark of the quickstart preset, with sizes at which it measures nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_quickstart


def test_a_row_for_each_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quickstart.json"
    monkeypatch.setattr(sys, "argv", ["bench_quickstart.py", "--smoke", "--json", str(path)])
    assert bench_quickstart.main() == 0
    result = json.loads(path.read_text())
    assert result["failures"] == []
    assert [(row["precision"], row["seed"]) for row in result["rows"]] == [("auto", 0), ("32-true", 0)]
    for row in result["rows"]:
        assert row["attention"] == "portable"
        assert row["tokens"] == 4 * 2 * 64  # steps, samples, context
        assert row["tokens_per_s"] > 0
        assert 0.0 < row["last_val_loss"] < row["first_val_loss"]

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume", str(path)])
    capsys.readouterr()
    assert bench_quickstart.main() == 0
    assert "run folder" not in capsys.readouterr().out  # nothing is measured again
