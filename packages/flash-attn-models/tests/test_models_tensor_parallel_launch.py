"""Starts the tests of several ranks, ranks_of_*.py: with gloo on the CPU, and with NCCL on GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
FILES = sorted(str(file) for file in TESTS.glob("ranks_of_*.py"))

# Everything on two ranks. On three, heads and vocabulary are uneven; on four, ranks share key/value heads.
SELECTION = {
    2: "",
    3: "test_decoder and (gpt2 or tinyllama) or generation and gpt2 or bert_masked_lm or vit or bad_input"
    " or test_cross_attention",
    4: "test_decoder and (tinyllama or falcon) or generation and tinyllama or shared_conv or pretraining and 7"
    " or test_cross_attention",
}


def run_ranks(ranks: int, folder: Path, **variables: str) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "model_rank_process"]
    selection = ["-k", SELECTION[ranks]]
    command = [sys.executable, "-m", "pytest", *FILES, *options, *selection]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment |= {
        "MODELS_TEST_RANKS": str(ranks),
        "MODELS_TEST_RENDEZVOUS": (folder / "rendezvous").as_uri(),
        "MODELS_TEST_FOLDER": str(folder),
    }
    outputs = [folder / f"rank{rank}.txt" for rank in range(ranks)]  # pipes could fill up
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, "MODELS_TEST_RANK": str(rank)},
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
        assert passed and int(passed[1]) >= 8, everything
        assert "skipped" not in text, everything


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_the_cpu(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, tmp_path, CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_on_gpus(ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, and there is {torch.cuda.device_count()}")
    run_ranks(ranks, tmp_path)
