"""Averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from flash_attn_train.callbacks import EMA, EMA_KEY
from flash_attn_train.errors import CheckpointError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Numbers(IterableDataset):
    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.first, self.first + 1000):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(number))


class Task(pl.LightningModule):
    """Keeps its weights after every step, and those that it validates with."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, width)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.history: dict[int, torch.Tensor] = {}
        self.validated: dict[int, torch.Tensor] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(batch).square().mean()

    def on_train_batch_start(self, *args: Any) -> None:
        self.history[self.global_step] = self.model.weight.detach().clone()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated[self.global_step] = self.model.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=0.1)


class Save(pl.callbacks.Checkpoint):
    def __init__(self, path: Path, steps: tuple[int, ...]) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")


def fit(
    folder: Path,
    ema: EMA,
    *,
    steps: int = 6,
    checkpoint: Path | None = None,
    first: int = 0,
    task: Task | None = None,
) -> Task:
    task = task or Task()
    folder.mkdir(exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[ema, Save(folder, (3, 6))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(Numbers(first), batch_size=None)
    validation = DataLoader([torch.zeros(4, 3)], batch_size=None)
    trainer.fit(task, data, validation, ckpt_path=checkpoint, weights_only=True)
    return task


@pytest.mark.parametrize("warmup", [True, False])
def test_average_by_hand(tmp_path: Path, warmup: bool) -> None:
    task = fit(tmp_path, EMA(0.7, warmup=warmup))
    trained = torch.load(tmp_path / "6.ckpt", weights_only=True)["state_dict"]["model.weight"]
    history = {**task.history, 6: trained}
    average = history[0].double()
    for step in range(1, 7):
        decay = min(0.7, step / (9 + step)) if warmup else 0.7
        average = decay * average + (1 - decay) * history[step].double()
        if step % 2 == 0:
            torch.testing.assert_close(task.validated[step].double(), average, rtol=1e-5, atol=1e-6)
    # Training went on from its own weights, and what is left at the end is the average.
    torch.testing.assert_close(task.model.weight.detach().double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(task.model.weight, trained)


def test_training_is_as_without(tmp_path: Path) -> None:
    fit(tmp_path / "with", EMA(0.9))
    with_average = torch.load(tmp_path / "with/6.ckpt", weights_only=True)["state_dict"]
    task = Task()
    for step, batch in zip(range(6), Numbers(0), strict=False):
        if step == 0:
            optimizer = task.configure_optimizers()
        optimizer.zero_grad()
        task.training_step(batch, step).backward()
        optimizer.step()
    assert all(torch.equal(with_average[name], value) for name, value in task.state_dict().items())


def test_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", EMA(0.9, every_n_steps=2))
    resumed = fit(
        tmp_path / "resumed", EMA(0.9, every_n_steps=2), checkpoint=tmp_path / "whole/3.ckpt", first=3
    )
    assert torch.equal(whole.model.weight, resumed.model.weight)
    one, other = (torch.load(tmp_path / name / "6.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert one[EMA_KEY].keys() == {"model.weight", "model.bias"}  # what is not trained has no average
    for key in ("state_dict", EMA_KEY):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key
    state = next(value for name, value in one["callbacks"].items() if name.startswith("EMA"))
    assert state == {"updates": 3}


def test_checkpoint_of_an_interrupted_validation_has_the_trained_weights(tmp_path: Path) -> None:
    class Interrupted(Task):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.global_step == 4:
                raise RuntimeError("interrupted")

    class SaveOnException(pl.callbacks.Checkpoint):
        def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[EMA(0.9), SaveOnException()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Interrupted()
    with pytest.raises(RuntimeError, match="interrupted"):
        validation = DataLoader([torch.zeros(4, 3)], batch_size=None)
        trainer.fit(task, DataLoader(Numbers(0), batch_size=None), validation)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert torch.equal(saved[EMA_KEY]["model.weight"], task.validated[4])
    assert not torch.equal(saved["state_dict"]["model.weight"], task.validated[4])


def test_checkpoint_without_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "first", EMA(0.9))
    path = tmp_path / "first/3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[EMA_KEY]
    torch.save(checkpoint, path)
    fit(tmp_path / "second", EMA(0.9), checkpoint=path, first=3)
    assert "has no averaged weights" in capsys.readouterr().out


def test_averages_of_another_model(tmp_path: Path) -> None:
    fit(tmp_path / "first", EMA(0.9))
    path = tmp_path / "first/3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[EMA_KEY]["model.weight"] = torch.zeros(5, 3)
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"model\.weight: got shape \(5, 3\), expected shape \(2, 3\)"):
        fit(tmp_path / "second", EMA(0.9), checkpoint=path, first=3)
