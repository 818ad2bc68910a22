"""What auto and null values of a config mean here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from flash_attn_train.configs import CosineConfig, TrainConfig, TrainerConfig
from flash_attn_train.configs.strategy import DDPConfig, StrategyConfig, TensorParallelConfig
from flash_attn_train.device import describe_device, resolve, resolve_epochs
from flash_attn_train.errors import ConfigError


def resolved(strategy: StrategyConfig | None = None, **trainer: Any) -> TrainerConfig:
    config = TrainConfig(trainer=TrainerConfig(**{"accelerator": "cpu", **trainer}))
    return resolve(dataclasses.replace(config, strategy=strategy or config.strategy)).trainer


def test_nothing_is_left_open() -> None:
    config = TrainConfig(trainer=TrainerConfig(accelerator="cpu", max_steps=200))
    now = resolve(config)
    assert (now.trainer.precision, now.trainer.accelerator) == ("32-true", "cpu")
    assert (now.scheduler.warmup_steps, now.scheduler.decay_steps) == (20, 200)
    assert config.trainer.precision == "auto" and config.scheduler.decay_steps is None  # a copy
    assert resolve(now) == now


def test_own_schedule_is_kept() -> None:
    config = TrainConfig(
        trainer=TrainerConfig(accelerator="cpu", max_steps=200),
        scheduler=CosineConfig(warmup_steps=0, decay_steps=900),
    )
    scheduler = resolve(config).scheduler
    assert (scheduler.warmup_steps, scheduler.decay_steps) == (0, 900)


def test_epochs_are_as_many_steps_as_their_samples_take() -> None:
    def steps(max_epochs: float, num_samples: int, **trainer: Any) -> tuple[int, int | None, int | None]:
        settings = {
            "accelerator": "cpu",
            "max_steps": -1,
            "max_epochs": max_epochs,
            "batch_size": 4,
            **trainer,
        }
        config = resolve(TrainConfig(trainer=TrainerConfig(**settings), strategy=DDPConfig()))
        assert (config.scheduler.warmup_steps, config.scheduler.decay_steps) == (None, None)
        now = resolve_epochs(config, num_samples)
        assert now.trainer.max_epochs is None and resolve(now) == now
        return now.trainer.max_steps, now.scheduler.warmup_steps, now.scheduler.decay_steps

    assert steps(2, 100) == (50, 5, 50)
    assert steps(1, 101) == (26, 2, 26)  # every sample is seen
    assert steps(0.5, 100) == (13, 1, 13)
    assert steps(2, 100, devices=2, global_batch_size=40) == (5, 0, 5)


def test_a_schedule_of_its_own_must_fit_into_the_epochs() -> None:
    trainer = TrainerConfig(accelerator="cpu", max_steps=-1, max_epochs=1.0, batch_size=10)
    config = resolve(TrainConfig(trainer=trainer, scheduler=CosineConfig(warmup_steps=7)))
    assert resolve_epochs(config, 100).scheduler.warmup_steps == 7
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_steps: got 7, expected at most 5"):
        resolve_epochs(config, 50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_auto_without_a_gpu() -> None:
    trainer = resolved(accelerator="auto")
    assert (trainer.accelerator, trainer.precision) == ("cpu", "32-true")


def test_global_batch_sets_the_accumulation() -> None:
    assert resolved(batch_size=4, global_batch_size=32).accumulate_grad_batches == 8
    assert resolved(DDPConfig(), batch_size=4, global_batch_size=32, devices=2).accumulate_grad_batches == 4
    # Tensor-parallel devices share their samples.
    shared = TensorParallelConfig(tensor_parallel_size=2)
    assert resolved(shared, batch_size=4, global_batch_size=32, devices=4).accumulate_grad_batches == 4
    assert resolved(batch_size=4, accumulate_grad_batches=3).accumulate_grad_batches == 3


@pytest.mark.parametrize("size", [2, 10])
def test_global_batch_that_cannot_be_divided(size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"global_batch_size: got {size}, expected a multiple of 8: .* 2 data-par"
    ):
        resolved(DDPConfig(), batch_size=4, global_batch_size=size, devices=2)


def test_torchrun_says_how_many_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    others = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in {**ranks, **others}.items():
        monkeypatch.setenv(name, value)
    trainer = resolved(DDPConfig(), batch_size=1, global_batch_size=12)
    assert (trainer.devices, trainer.num_nodes, trainer.accumulate_grad_batches) == (2, 3, 2)


def test_device_in_words() -> None:
    config = resolve(TrainConfig(trainer=TrainerConfig(accelerator="cpu")))
    assert describe_device(config).startswith("CPU (") and "threads" in describe_device(config)
