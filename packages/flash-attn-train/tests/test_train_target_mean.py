"""The loss of a step is the mean over its targets, over whatever passes and processes they are spread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run import train

_EPS = torch.finfo(torch.float32).eps
STEPS = 6
TINY = [
    *("task=masked_lm", "model=bert", "tokenizer.vocab_size=300", "model.attn_dropout=0"),
    *("model.max_seqlen=32", "model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.dropout=0"),
    *("trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", f"trainer.val_every_n_steps={STEPS}"),
    *("trainer.val_sequences=8", "data.val_fraction=0.2", "optimizer.lr=1e-2", "scheduler.warmup_steps=0"),
    *("logger.every_n_steps=1", "logger.tensorboard=false", "checkpoint.every_n_steps=100"),
]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Documents of two and of many words, in which 1 and up to 5 tokens are hidden."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"word {number}" if number % 2 else f"the dog {number} sees it " * 5)
    return [*TINY, f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]


def record(folder: Path) -> torch.Tensor:
    """Losses and gradient norms, (2, steps)."""
    rows = [row for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    return torch.tensor([[row["train/loss"] for row in rows], [row["grad_norm"] for row in rows]])


def test_passes_and_ranks_are_one_batch(arguments: list[str], tmp_path: Path) -> None:
    whole, passes, ranks = (tmp_path / name for name in ("whole", "passes", "ranks"))
    train(compose_config([*arguments, "trainer.batch_size=8", f"output_dir={whole}"]))
    halves = [*arguments, "trainer.batch_size=2", "trainer.global_batch_size=8"]
    train(compose_config([*halves, f"output_dir={passes}"]))

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = [*halves, "trainer.devices=2", "strategy=zero3", f"output_dir={ranks}"]
    done = subprocess.run(
        [*launcher, "-m", "flash_attn_train.cli", *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    expected = record(whole)
    assert expected.shape == (2, STEPS)
    for folder in (passes, ranks):
        # Sums of few numbers in another order, whose rounding grows over the steps.
        difference = (record(folder) - expected).abs().amax(1)
        assert (difference <= 64 * STEPS * _EPS * expected.amax(1)).all(), difference
