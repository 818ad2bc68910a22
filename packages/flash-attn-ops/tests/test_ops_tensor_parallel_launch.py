"""Starts the tests of several ranks, ranks_*.py: with gloo on the CPU, and with NCCL on two GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
FILES = sorted(str(file) for file in TESTS.glob("ranks_*.py"))


def run_ranks(ranks: int, rendezvous: Path, **variables: str) -> None:
    # Compiling loads so much that only one number of ranks does it.
    selection = [] if ranks == 2 else ["-k", "not compiled"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "rank_process", *selection]
    command = [sys.executable, "-m", "pytest", *FILES, *options]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment |= {"OPS_TEST_RANKS": str(ranks), "OPS_TEST_RENDEZVOUS": rendezvous.as_uri()}
    outputs = [rendezvous.with_name(f"rank{rank}.txt") for rank in range(ranks)]  # pipes could fill up
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                variables_of_rank = {**environment, "OPS_TEST_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(
                        command,
                        env=variables_of_rank,
                        cwd=TESTS.parent,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [output.read_text() for output in outputs]
    everything = "\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(texts))
    assert codes == [0] * ranks, everything
    for text in texts:
        passed = re.search(r"(\d+) passed", text)
        assert passed and int(passed[1]) >= 30, everything
        assert "skipped" not in text, everything


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_the_cpu(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, tmp_path / "rendezvous", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")


@pytest.mark.gpu
def test_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and there is {torch.cuda.device_count()}")
    run_ranks(2, tmp_path / "rendezvous")
