"""Learning-rate schedules, and what Lightning is given of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from flash_attn_train.configs.scheduler import (
    SCHEDULERS,
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    MultiStepConfig,
    PlateauConfig,
    PolyConfig,
    SchedulerConfig,
    StepConfig,
    WSDConfig,
)
from flash_attn_train.errors import ConfigError
from flash_attn_train.optim import WarmupPlateau, build_scheduler, make_schedule, warmup_cosine
from torch import nn

SCHEDULE = {"warmup_steps": 10, "decay_steps": 110, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (60, 0.55),
        (110, 0.1),
        (10_000, 0.1),
    ],
)
def test_cosine_values(step: int, factor: float) -> None:
    assert warmup_cosine(step, **SCHEDULE) == pytest.approx(factor, rel=1e-12)


def test_cosine_without_warmup_or_decay() -> None:
    assert warmup_cosine(0, warmup_steps=0, decay_steps=10, min_lr_ratio=0.0) == 1.0
    assert warmup_cosine(10, warmup_steps=10, decay_steps=10, min_lr_ratio=0.5) == 0.5
    assert warmup_cosine(9, warmup_steps=10, decay_steps=10, min_lr_ratio=0.5) == 1.0


LENGTHS: dict[str, Any] = {"warmup_steps": 10, "decay_steps": 110}


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (ConstantConfig(**LENGTHS), {10: 1.0, 500: 1.0}),
        (LinearConfig(**LENGTHS, min_lr_ratio=0.2), {10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        (PolyConfig(**LENGTHS, power=2.0), {10: 1.0, 60: 0.25, 110: 0.0, 500: 0.0}),
        (InverseSqrtConfig(**LENGTHS, min_lr_ratio=0.3), {9: 1.0, 39: 0.5, 89: 1 / 3, 999: 0.3}),
        (StepConfig(**LENGTHS, step_size=50, gamma=0.5), {10: 1.0, 49: 1.0, 50: 0.5, 100: 0.25}),
        (MultiStepConfig(**LENGTHS, milestones=[20, 40], gamma=0.1), {19: 1.0, 20: 0.1, 40: 0.01}),
        (
            WSDConfig(**LENGTHS, cooldown_steps=40, cooldown="linear", min_lr_ratio=0.2),
            {10: 1.0, 70: 1.0, 90: 0.6, 110: 0.2, 500: 0.2},
        ),
        (WSDConfig(**LENGTHS, cooldown_steps=40, cooldown="sqrt"), {70: 1.0, 80: 0.5, 110: 0.0}),
        (WSDConfig(**LENGTHS, cooldown_steps=40, cooldown="cosine"), {70: 1.0, 90: 0.5, 110: 0.0}),
        (WSDConfig(**LENGTHS), {87: 1.0, 88: 1.0, 89: 1 - math.sqrt(1 / 22), 110: 0.0}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerConfig) else "",
)
def test_values(config: SchedulerConfig, values: dict[int, float]) -> None:
    schedule = make_schedule(config, 110)
    assert [schedule(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step, factor in values.items():
        assert schedule(step) == pytest.approx(factor, rel=1e-12), step


def configs() -> list[SchedulerConfig]:
    options: dict[str, dict[str, Any]] = {"multi_step": {"milestones": [50]}}
    # The plateau is no function of the step alone.
    return [schema(**options.get(name, {})) for name, schema in SCHEDULERS.items() if name != "plateau"]


@pytest.mark.parametrize("config", configs(), ids=lambda config: type(config).__name__)
def test_never_rises_after_the_warmup_of_a_tenth(config: SchedulerConfig) -> None:
    schedule = make_schedule(config, 200)
    factors = [schedule(step) for step in range(400)]
    assert factors[18] < factors[19] == max(factors) == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[19:]))
    assert min(factors) >= 0.0


def test_the_length_of_the_schedule_is_decay_steps_before_max_steps() -> None:
    assert make_schedule(LinearConfig(decay_steps=100), 1000)(100) == 0.0
    assert make_schedule(LinearConfig(), 1000)(100) > 0.5


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MultiStepConfig(), "scheduler.milestones: got []"),
        (MultiStepConfig(milestones=[20, 20]), "scheduler.milestones: got [20, 20]"),
        (
            WSDConfig(warmup_steps=60, cooldown_steps=50),
            "scheduler.cooldown_steps: got 50 after a warmup of 60",
        ),
        (CosineConfig(warmup_steps=101), "scheduler.warmup_steps: got 101, expected at most 100"),
    ],
)
def test_numbers_that_do_not_fit_are_named(config: SchedulerConfig, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_schedule(config, 100)
    assert str(error.value).startswith(key)


def test_lightning_is_given_a_factor_for_each_step() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    entry = build_scheduler(LinearConfig(warmup_steps=2, decay_steps=6), optimizer, 6)
    assert entry["interval"] == "step"
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        entry["scheduler"].step()
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


class TestPlateau:
    def build(self, **changes: Any) -> tuple[torch.optim.Optimizer, WarmupPlateau]:
        linear = nn.Linear(2, 2)
        groups = [{"params": [linear.weight], "lr": 1.0}, {"params": [linear.bias], "lr": 0.1}]
        optimizer = torch.optim.SGD(groups)
        numbers = {"warmup_steps": 2, "factor": 0.5, "patience": 1, "min_lr_ratio": 0.2, **changes}
        entry = build_scheduler(PlateauConfig(**numbers), optimizer, 100, val_every_n_steps=3)
        assert entry["reduce_on_plateau"] and entry["monitor"] == "val/loss"
        return optimizer, entry["scheduler"]

    def run(
        self, optimizer: torch.optim.Optimizer, plateau: WarmupPlateau, losses: list[float]
    ) -> list[float]:
        """The rate of each step; each loss is there for three steps, as Lightning keeps it."""
        rates = []
        for number, loss in enumerate(losses):
            rates.append(optimizer.param_groups[0]["lr"])
            assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * rates[-1])
            optimizer.step()
            plateau.step(torch.tensor(loss) if number % 2 else loss)
        return rates

    def test_it_falls_after_patience_and_has_a_floor(self) -> None:
        losses = [loss for loss in [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0] for _ in range(3)]
        rates = self.run(*self.build(), losses)
        # Validations follow steps 3, 6, ...: 2 improvements, then every second one without is one too many.
        assert rates[:12] == [0.5, *[1.0] * 11]
        assert rates[12:18] == [0.5] * 6
        assert rates[18:24] == [0.25] * 6
        losses = [2.0] * 24
        optimizer, plateau = self.build(patience=0)
        assert self.run(optimizer, plateau, losses)[-1] == 0.2

    def test_a_validation_counts_once(self) -> None:
        """The task shows its loss to the schedule, and Lightning does once more."""
        optimizer, plateau = self.build(warmup_steps=0, patience=1)
        for loss in (2.0, 2.0, 2.0):
            for _ in range(3):
                optimizer.step()
            for _ in range(2):
                plateau.step(loss)
        assert plateau.scale == 0.5
        plateau.step(3.0)
        assert plateau.num_bad_epochs == 0

    def test_it_resumes_in_the_middle(self) -> None:
        losses = [loss for loss in [3.0, 2.0, 2.0, 2.5, 2.0, 2.0] for _ in range(3)]
        whole = self.run(*self.build(), losses)
        for stop in (1, 4, 9, 10, 14):
            optimizer, plateau = self.build()
            first = self.run(optimizer, plateau, losses[:stop])
            state, optimizer_state = plateau.state_dict(), optimizer.state_dict()
            assert all(isinstance(v, int | float | str | list | tuple | type(None)) for v in state.values())
            optimizer, plateau = self.build()
            optimizer.load_state_dict(optimizer_state)
            plateau.load_state_dict(state)
            assert first + self.run(optimizer, plateau, losses[stop:]) == whole

    def test_lightning_drives_it(self, tmp_path: Any) -> None:
        rates = fit(
            lambda optimizer: build_scheduler(
                PlateauConfig(warmup_steps=0, patience=0, factor=0.5), optimizer, 12, val_every_n_steps=4
            ),
            tmp_path,
        )
        # The loss never improves: after the second validation and each one after it the rate is halved.
        assert rates == [1.0] * 8 + [0.5] * 4


def fit(scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]], folder: Any) -> list[float]:
    """Twelve steps, two forward passes each, with a validation every four; returns the rate of each."""
    rates: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.linear(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val/loss", torch.tensor(1.0))

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": scheduler(optimizer)}

    data = torch.utils.data.DataLoader(torch.zeros(24, 2))  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=12,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), data, torch.utils.data.DataLoader(torch.zeros(1, 2)))  # type: ignore[arg-type]
    return rates
