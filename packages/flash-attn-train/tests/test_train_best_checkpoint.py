"""Which validations leave a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_attn_train.callbacks import RunCheckpoint
from pytorch_lightning.trainer.states import TrainerFn


class FakeTrainer:
    """Writes the step into the files."""

    world_size, max_steps, is_global_zero = 1, 100, True
    state = SimpleNamespace(fn=TrainerFn.FITTING)

    def __init__(self) -> None:
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.step = 0

    def save_checkpoint(self, path: Path) -> None:
        path.write_text(str(self.step))


def validate(folder: Path, losses: list[float], keep_top_k: int = 1) -> RunCheckpoint:
    """A callback that has seen these validation losses after steps 1, 2, ..."""
    saving = RunCheckpoint(
        folder / "last.ckpt",
        folder / "best.ckpt",
        every_n_steps=1000,
        val_every_n_steps=1,
        config={},
        data_key="",
        keep_top_k=keep_top_k,
        save_on_error=False,
    )
    trainer: Any = FakeTrainer()
    for step, loss in enumerate(losses, start=1):
        trainer.step = saving._step = step
        trainer.callback_metrics = {"val/loss": torch.tensor(loss)}
        saving.on_validation_end(trainer, None)  # type: ignore[arg-type]
    return saving


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep_top_k", [1, 2])
def test_a_loss_that_is_not_finite_is_never_among_the_best(
    tmp_path: Path, bad: float, keep_top_k: int
) -> None:
    saving = validate(tmp_path, [bad, 3.0, bad, 2.0, bad], keep_top_k)
    assert saving.best_loss == 2.0
    assert (tmp_path / "best.ckpt").read_text() == "4"
    kept = {"best-step-2.ckpt": 3.0, "best-step-4.ckpt": 2.0} if keep_top_k == 2 else {}
    assert saving.kept == kept
    assert {file.name for file in tmp_path.iterdir()} == {"best.ckpt", *kept}


def test_the_best_are_kept_and_others_go(tmp_path: Path) -> None:
    saving = validate(tmp_path, [5.0, 3.0, 4.0, 3.5, 6.0], keep_top_k=2)
    assert saving.kept == {"best-step-2.ckpt": 3.0, "best-step-4.ckpt": 3.5}
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "best.ckpt": "2",
        "best-step-2.ckpt": "2",
        "best-step-4.ckpt": "4",
    }
