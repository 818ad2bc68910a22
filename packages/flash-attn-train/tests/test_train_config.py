"""Schema, checks and presets."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from flash_attn_models.gpt import GPTConfig
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import (
    BertModelConfig,
    CosineConfig,
    GPTModelConfig,
    MaskedLMConfig,
    TrainConfig,
    check_config,
)
from flash_attn_train.configs.checks import flatten, options
from flash_attn_train.errors import ConfigError
from flash_attn_train.saved_config import restore_config


def with_value(key: str, value: Any) -> TrainConfig:
    config = TrainConfig()
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    return config


def test_defaults_pass() -> None:
    check_config(TrainConfig())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.n_layer", "six", "model.n_layer: got 'six' (str), expected a whole number."),
        ("model.n_layer", True, "model.n_layer: got True (bool), expected a whole number."),
        ("model.n_layer", 0, "model.n_layer: got 0, expected a whole number, at least 1."),
        ("model.d_inner", 1.5, "model.d_inner: got 1.5 (float), expected a whole number or null."),
        ("optimizer.lr", None, "optimizer.lr: got None (NoneType), expected a number."),
        ("optimizer.lr", 0.0, "optimizer.lr: got 0.0, expected a number, above 0.0."),
        ("model.dropout", 1.0, "model.dropout: got 1.0, expected a number, at least 0.0 and below 1.0."),
        ("model.norm", "batch", "model.norm: got 'batch', expected one of layer_norm, rms_norm."),
        ("data.suffixes", ".py", "data.suffixes: got '.py' (str), expected a list of text."),
        ("logger.tensorboard", "yes", "logger.tensorboard: got 'yes' (str), expected true or false."),
        ("model.n_head", 3, "model.d_model: got 256, expected a multiple of model.n_head (3)"),
        ("model.n_head_kv", 3, "model.n_head_kv: got 3, expected a divisor of model.n_head (4)"),
        ("scheduler.warmup_steps", 501, "scheduler.warmup_steps: got 501, expected at most 500"),
    ],
)
def test_wrong_value_is_named(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(with_value(key, value))
    assert str(error.value).startswith(expected)


def test_an_empty_path_is_no_folder() -> None:
    for path in ("", " "):
        with pytest.raises(ConfigError, match=r"data\.path: got ' ?', expected a file or folder of text"):
            check_config(with_value("data.path", path))


def test_activation_checkpointing_is_for_models_that_have_it() -> None:
    for what in ("none", "layers", "attention", "mlp"):
        check_config(with_value("trainer.activation_checkpointing", what))
    with pytest.raises(ConfigError, match="expected one of none, layers, attention, mlp"):
        check_config(with_value("trainer.activation_checkpointing", "some"))
    config = TrainConfig(task=MaskedLMConfig(), model=BertModelConfig())
    config.trainer.activation_checkpointing = "layers"
    check_config(config)
    config.trainer.activation_checkpointing = "mlp"
    with pytest.raises(ConfigError, match="got 'mlp' for a BertModelConfig, expected none or layers"):
        check_config(config)


def test_activation_checkpointing_may_be_true_or_false() -> None:
    for given, meant in (("true", "layers"), ("false", "none"), ("attention", "attention")):
        config = compose_config(["experiment=smoke", f"trainer.activation_checkpointing={given}"])
        assert config.trainer.activation_checkpointing == meant
    saved = {**flatten(TrainConfig()), "trainer.activation_checkpointing": True}
    assert restore_config(saved, source="old.ckpt").trainer.activation_checkpointing == "layers"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["trainer.max_steps=-1", "trainer.max_epochs=2"], None),
        (["trainer.max_steps=-1", "trainer.max_epochs=0.5"], None),
        (
            ["trainer.max_epochs=2"],
            r"max_steps: got 20 with trainer\.max_epochs=2.*Set trainer\.max_steps=-1",
        ),
        (["trainer.max_steps=-1"], r"max_steps: got -1, expected a whole number, at least 1; or -1 with"),
        (["trainer.max_steps=0"], r"max_steps: got 0, expected a whole number, at least 1"),
        (["trainer.max_steps=-1", "trainer.max_epochs=0"], r"max_epochs: got 0.*above 0\.0"),
        (
            ["trainer.max_steps=-1", "trainer.max_epochs=1", "data=c4"],
            r"max_epochs: got 1.* with data\.streaming=true",
        ),
    ],
)
def test_length_is_in_steps_or_in_epochs(keys: list[str], message: str | None) -> None:
    if message is None:
        compose_config(["experiment=smoke", *keys])
        return
    with pytest.raises(ConfigError, match=message):
        compose_config(["experiment=smoke", *keys])


@pytest.mark.parametrize("mode", ["debug", "profile", "smoke"])
def test_modes_have_their_own_length(mode: str) -> None:
    keys = ["trainer.max_steps=-1", "trainer.max_epochs=2"]
    with pytest.raises(ConfigError, match=r"one of the two|got -1"):
        compose_config(["experiment=smoke", f"mode={mode}", keys[0]])
    assert compose_config(["experiment=smoke", f"mode={mode}", *keys]).trainer.max_epochs == 2


def test_whole_number_is_a_number() -> None:
    check_config(with_value("optimizer.lr", 1))


def test_warmup_is_compared_with_the_schedule_that_holds() -> None:
    config = TrainConfig(scheduler=CosineConfig(warmup_steps=600, decay_steps=1000))
    check_config(config)


def test_flatten_has_every_option_and_the_variant_of_every_section() -> None:
    flat = flatten(TrainConfig())
    assert {option.key: option.default for option in options()}.items() <= flat.items()
    others = set(flat) - {option.key for option in options()}
    assert others == {"task", "model", "data", "optimizer", "scheduler", "strategy"}
    assert flat["optimizer"] == "AdamWConfig"


def test_options_are_those_of_the_chosen_variants() -> None:
    config = TrainConfig(task=MaskedLMConfig(), model=BertModelConfig())
    keys = {option.key for option in options(config)}
    assert "task.mask_probability" in keys and "task.documents" not in keys
    assert "model.n_head_kv" not in keys
    check_config(config)


def test_model_that_cannot_learn_the_task_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model: got GPTModelConfig for the task MaskedLMConfig, expected Bert"
    ):
        check_config(TrainConfig(task=MaskedLMConfig()))


def test_model_options_are_those_of_the_model() -> None:
    """Same names, types and defaults, so that passing them on by name means the same."""
    theirs = {field.name: field for field in dataclasses.fields(GPTConfig)}
    their_types, our_types = typing.get_type_hints(GPTConfig), typing.get_type_hints(GPTModelConfig)
    ours = {field.name for field in dataclasses.fields(GPTModelConfig)}
    translated = {"warm_start", "warm_start_skip", "rotary_fraction", "rotary_scaling", "pad_vocab_multiple"}
    assert translated <= ours
    for field in dataclasses.fields(GPTModelConfig):
        if field.name in translated:
            continue
        assert our_types[field.name] == their_types[field.name]
        if theirs[field.name].default is not dataclasses.MISSING:
            assert field.default == theirs[field.name].default
