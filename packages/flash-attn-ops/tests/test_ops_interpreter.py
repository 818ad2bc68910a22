"""The kernel tests without a GPU: Triton interprets the kernels on the CPU, in a process of its own.

Triton decides when kernels are defined whether it compiles or interprets them, so that the two cannot share a
process with each other.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
FILES = sorted(PACKAGE.glob("tests/test_ops_*_kernels.py"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_interpreted(file: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", str(file), "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        command, env=environment, cwd=PACKAGE, capture_output=True, text=True, check=False
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= 6, output


def test_every_family_is_there() -> None:
    assert [file.stem.removeprefix("test_ops_") for file in FILES] == [
        "activations_kernels",
        "cross_entropy_kernels",
        "fused_dense_kernels",
        "linear_cross_entropy_kernels",
        "norm_calls_kernels",
        "norm_dropout_kernels",
        "norm_kernels",
        "rotary_kernels",
    ]
