"""The benchmark of BERT runs, with sizes at which it measures nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_bert.py"


def test_it_runs_every_contestant_on_a_cpu(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    contestants = {(line.split()[0], line.split()[3], line.split()[4]) for line in lines}
    assert contestants == {
        (task, dropout, name)
        for task, dropout in (("training", "0.0"), ("training", "0.1"), ("embeddings", "0.0"))
        for name in ("padding-free", "packed", "padded", "transformers")
    }
