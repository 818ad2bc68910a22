"""The command line under torchrun: the run of one process, on two; and its checkpoint on one again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run import train

_EPS = torch.finfo(torch.float32).eps

TINY = [
    *(
        "model.max_seqlen=16",
        "model.n_layer=1",
        "model.n_head=2",
        "model.d_model=16",
        "tokenizer.vocab_size=300",
    ),
    *(
        "trainer.accelerator=cpu",
        "trainer.val_every_n_steps=3",
        "trainer.val_sequences=8",
        "data.val_fraction=0.2",
    ),
    *(
        "checkpoint.every_n_steps=2",
        "generation.max_new_tokens=4",
        "logger.every_n_steps=1",
        "scheduler.decay_steps=6",
    ),
    "logger.tensorboard=false",
]


def losses(folder: Path) -> torch.Tensor:
    rows = read_metrics(folder / "metrics.csv")
    return torch.tensor([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.mark.slow
def test_two_ranks_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launch: Callable[..., str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"the cat {number} sees the dog.\n" * 60)
    common = [*TINY, f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    alone = [*common, "trainer.batch_size=4"]
    train(compose_config([*alone, "trainer.max_steps=8", f"output_dir={tmp_path / 'one'}"]))

    two = ["trainer.batch_size=2", "trainer.devices=2", "strategy=zero3", "trainer.max_steps=6"]
    printed = launch("-m", "flash_attn_train.cli", *common, *two, f"output_dir={tmp_path / 'two'}", ranks=2)
    assert printed.count("step 6/6  validation loss") == 1  # rank 0 alone speaks
    assert (tmp_path / "two" / "checkpoints" / "last.ckpt").is_dir()

    capsys.readouterr()
    train(compose_config([*alone, "trainer.max_steps=8", f"resume={tmp_path / 'two'}"]))
    assert "continuing from step 6" in capsys.readouterr().out
    one, both = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.shape == both.shape == (8,)
    # Eight steps, in each of which sums of few numbers are taken in another order.
    assert (one - both).abs().max() <= 8 * 4 * _EPS * one.max()
