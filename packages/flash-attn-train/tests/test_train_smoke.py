"""mode=smoke: what is left of a config, and that a run of every kind goes through with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    TextDataConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.image_data import DigitsDataConfig
from flash_attn_train.configs.store import entries
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import read_metrics
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.run import train


def test_leaves_the_kind_and_shrinks_the_rest() -> None:
    config = compose_config(["experiment=owt/gpt2xl", "mode=smoke"])
    assert isinstance(config.model, GPTModelConfig) and isinstance(config.data, TextDataConfig)
    assert config.model.norm == "layer_norm" and config.model.d_model == 64
    assert config.trainer.max_steps == 4 and config.tokenizer.name is None


def test_keys_win_over_the_mode() -> None:
    keys = ["trainer.max_steps=7", "model.n_layer=3", "data.num_workers=2", "generation.max_new_tokens=0"]
    config = compose_config(["experiment=owt/gpt2xl", "mode=smoke", *keys])
    assert isinstance(config.model, GPTModelConfig)
    assert (config.trainer.max_steps, config.model.n_layer, config.model.d_model) == (7, 3, 64)
    assert (config.data.num_workers, config.generation.max_new_tokens) == (2, 0)


def test_own_text_is_kept() -> None:
    config = compose_config(["experiment=quickstart", "mode=smoke", "data.path=mine", "data.suffixes=[.md]"])
    assert isinstance(config.data, TextDataConfig)
    assert (config.data.path, config.data.suffixes) == ("mine", [".md"])


def test_fields_of_a_model_of_transformers_are_kept() -> None:
    config = compose_config(["experiment=owt/gpt2s-hf", "mode=smoke", "model.config.n_layer=3"])
    assert isinstance(config.model, HuggingFaceModelConfig) and config.model.config["n_layer"] == 3
    other = compose_config(["experiment=owt/gpt2s-hf", "mode=smoke"])
    assert isinstance(other.model, HuggingFaceModelConfig) and other.model.config["n_layer"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["experiment=owt/gpt2s", "data.split=test"],
            r"data\.split: got 'test' with mode=smoke, which uses TextData",
        ),
        (
            ["experiment=owt/gpt2s-hf", "model.model_type=opt"],
            r"model\.model_type: got 'opt' with mode=smoke",
        ),
    ],
)
def test_what_cannot_be_kept_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([*arguments, "mode=smoke"])


def test_every_experiment_has_a_tiny_model() -> None:
    for name in entries("experiment"):
        config = compose_config([f"experiment={name}", "mode=smoke"])
        assert isinstance(config.data, (TextDataConfig, DigitsDataConfig)), name
        classes = 10 if isinstance(config.model, ViTModelConfig) else 0
        with torch.device("meta"):
            model = build_model(
                config.model, DataSizes(vocab_size=config.tokenizer.vocab_size, num_classes=classes)
            )
        assert sum(parameter.numel() for parameter in model.parameters()) < 300_000, name


RUNS = {  # experiment -> its model
    "owt/gpt2s": GPTModelConfig,
    "owt/gpt2s-hf": HuggingFaceModelConfig,
    "pile/gpt3s-flash-rotary": GPTModelConfig,
    "llama/llama-1b": GPTModelConfig,
    "llama/llama-1b-hf": HuggingFaceModelConfig,
    "bert/base": BertModelConfig,
    "imagenet/vit-small": ViTModelConfig,
    "digits": ViTModelConfig,
}


@pytest.mark.parametrize("name", RUNS)
def test_run_of_every_kind(
    name: str, tmp_path: Path, standard_library_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if RUNS[name] is HuggingFaceModelConfig:
        pytest.importorskip("transformers", reason="a model of transformers")
    if RUNS[name] is ViTModelConfig:
        pytest.importorskip("sklearn", reason="trains on scikit-learn's digits")
    # As on a laptop: without the experiment's eight GPUs.
    devices = [
        "trainer.devices=1",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.compile=false",
    ]
    output = [f"output_dir={tmp_path / 'run'}"]
    if RUNS[name] is not ViTModelConfig:
        output.append(f"data.cache_dir={standard_library_cache / 'flash-attn-train'}")
    config = compose_config([f"experiment={name}", "mode=smoke", *devices, *output])
    assert isinstance(config.model, RUNS[name])
    result = train(config)

    rows = read_metrics(result.folder / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 2, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert read_checkpoint(result.last_checkpoint)["global_step"] == 4
    assert result.picture.exists() and result.report.exists()
    assert bool(result.sample) == (RUNS[name] is GPTModelConfig)
    if RUNS[name] is ViTModelConfig:
        assert "val/accuracy" in result.last_val
    assert capsys.readouterr().err == ""
