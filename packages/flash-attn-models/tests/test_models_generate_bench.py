"""The benchmark of generation runs, at tiny sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_generate.py"


@pytest.mark.skipif(not BENCHMARK.exists(), reason="tests run without the package's benchmarks beside them")
def test_it_measures_every_contestant():
    pytest.importorskip("transformers")
    result = subprocess.run(
        [sys.executable, str(BENCHMARK), "--smoke"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [
        line.split("  ") for line in result.stdout.splitlines() if line.startswith(("decode", "prefill"))
    ]
    assert {(line[0], line[1], line[4]) for line in lines} == {
        (phase, model, contestant)
        for model in ("llama", "gpt2")
        for phase, contestants in (
            ("decode", ("ours", "transformers")),
            ("prefill", ("ours", "matrix products and attention alone", "transformers")),
        )
        for contestant in contestants
    }
