"""What is found wrong before a run has a folder."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_train.configs import (
    BertModelConfig,
    GPTModelConfig,
    MaskedLMConfig,
    TrainConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.callbacks import EarlyStoppingConfig
from flash_attn_train.configs.logger import WandbConfig
from flash_attn_train.configs.optimizer import AdamW8bitConfig
from flash_attn_train.configs.strategy import DDPConfig, TensorParallelConfig
from flash_attn_train.data import DataFacts, DataModule
from flash_attn_train.device import resolve
from flash_attn_train.errors import ConfigError, DataError
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.preflight import check_machine, check_run
from flash_attn_train.run import train

SIZES = DataSizes(vocab_size=300, num_classes=3)


def data_of(config: TrainConfig, *, train: int = 100, validation: int = 100) -> DataModule:
    """With so many samples, of which none is read."""
    samples: Any = [range(train), range(validation)]
    return DataModule(*samples, DataFacts(key="key", lines={}), config)


def check(config: TrainConfig, **samples: int) -> None:
    with torch.device("meta"):
        model = build_model(config.model, SIZES)
    check_machine(config)
    check_run(config, model, data_of(config, **samples))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"train": 3}, r"data: got 3 samples to train on for 4 data-parallel ranks"),
        (
            {"validation": 2},
            r"data: got 2 samples to validate on for 4 data-parallel ranks.*data\.val_fraction",
        ),
    ],
)
def test_fewer_samples_than_ranks(
    small_config: Callable[..., TrainConfig], samples: dict[str, int], message: str
) -> None:
    config = resolve(small_config(strategy=DDPConfig(), trainer={"devices": 2, "num_nodes": 2}))
    check(config, train=4, validation=4)
    with pytest.raises(DataError, match=message):
        check(config, **samples)


def test_too_few_samples_leave_no_folder(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = small_config(strategy=DDPConfig(), trainer={"devices": 2, "val_sequences": 1})
    with pytest.raises(DataError, match="got 1 samples to validate on for 2"):
        train(config)
    assert list(tmp_path.iterdir()) == []


def test_the_data_do_not_have_to_be_prepared_first(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_train.loggers.build.find_spec", lambda name: None)
    monkeypatch.setattr("flash_attn_train.run.build_data", None)  # may take hours
    for changes, message in (
        ({"logger": {"wandb": WandbConfig(enabled=True)}}, r"logger\.wandb\.enabled"),
        ({"trainer": {"devices": 2}}, r"strategy: got single"),
        (
            {"callbacks": {"early_stopping": EarlyStoppingConfig(enabled=True, monitor="x")}},
            "monitor: got 'x'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            train(small_config(**changes))


def test_gpu_affinity_needs_its_library(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(small_config(callbacks={"gpu_affinity": True}))
    monkeypatch.setattr("flash_attn_train.preflight.find_spec", lambda name: None)
    check(config)  # without a GPU it does nothing
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config.trainer.accelerator = "cuda"
    with pytest.raises(
        ConfigError, match=r"callbacks\.gpu_affinity: got true, but nvidia-ml-py is not installed"
    ):
        check(config)
    monkeypatch.setattr("flash_attn_train.preflight.find_spec", lambda name: object())
    check(config)


def test_8_bit_optimizer_needs_its_library(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"adamw_8bit, which needs bitsandbytes"):
        check(resolve(small_config(optimizer=AdamW8bitConfig())))


def test_early_stopping_watches_what_is_measured(small_config: Callable[..., TrainConfig]) -> None:
    def with_monitor(monitor: str, **changes: Any) -> TrainConfig:
        stopping = EarlyStoppingConfig(enabled=True, monitor=monitor)
        return resolve(small_config(callbacks={"early_stopping": stopping}, **changes))

    check(with_monitor("val/perplexity"))
    with pytest.raises(ConfigError, match=r"monitor: got 'val/accuracy', .*: val/loss, val/perplexity\."):
        check(with_monitor("val/accuracy"))
    bert = BertModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=16)
    check(with_monitor("val/accuracy", task=MaskedLMConfig(), model=bert))


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        (GPTModelConfig(n_head=4, max_seqlen=30), 3, None),
        (GPTModelConfig(n_head=4, n_head_kv=2), 4, None),
        (GPTModelConfig(n_head=4, n_head_kv=1), 4, None),
        (GPTModelConfig(n_head=4), 8, r"tensor_parallel_size: got 8 for model\.n_head=4"),
        (GPTModelConfig(n_head=6, n_head_kv=2, d_model=96), 3, r"got 3 for model\.n_head=6 and 2 key"),
        (ViTModelConfig(n_head=2, d_model=32, n_layer=1), 2, None),
        (
            ViTModelConfig(n_head=8, d_model=32, n_layer=1),
            8,
            r"trainer\.batch_size: got 4, expected a multiple",
        ),
    ],
)
def test_heads_and_images_can_be_shared(
    small_config: Callable[..., TrainConfig],
    model: Any,
    ranks: int,
    message: str | None,
) -> None:
    strategy = TensorParallelConfig(tensor_parallel_size=ranks)
    config = resolve(small_config(strategy=strategy, trainer={"devices": ranks}))
    config = dataclasses.replace(config, model=model)
    if message is None:
        check(config)
        return
    with pytest.raises(ConfigError, match=message):
        check(config)
