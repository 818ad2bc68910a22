"""From the config in a checkpoint back to a config, with overrides on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_attn_train.cli import compose_part
from flash_attn_train.configs import TrainConfig, check_config
from flash_attn_train.configs.checks import get_value, options
from flash_attn_train.configs.store import SCHEMAS
from flash_attn_train.configs.unread import is_given
from flash_attn_train.errors import CheckpointError, ConfigError

# What decides about the model, its data and how it is measured. The rest is about training.
_KEPT = ("seed", "task", "model", "data", "tokenizer", "trainer", "metrics")
_GROUPS = ("task", "model", "data")


def restore_config(saved: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> TrainConfig:
    """The config that a checkpoint has in it, as far as it is about model, data and measurement.

    Args:
        saved: dotted key -> value, and name of its class for each of task, model and data.
        overrides: ``key=value`` and ``GROUP=NAME`` as on the command line. A group that is named here is taken from
            there as a whole.
        source: what a message calls the checkpoint.

    Raises:
        ConfigError: an override is wrong.
        CheckpointError: the config is of a version with other options.
    """
    given = override_keys(overrides)
    groups = [name for name in _GROUPS if name not in given]
    chosen = [f"{group}={_entry(group, saved, source)}" for group in groups]
    config = compose_part(["experiment=none", *chosen, *overrides])
    known = {option.key for option in options(config)}
    for key, value in saved.items():
        section = key.split(".")[0]
        is_group = key in _GROUPS
        if section not in _KEPT or is_group or section in given or is_given(key, given):
            continue
        if key not in known:
            raise CheckpointError(
                f"{source}: its config has {key}={value!r}, which this version does not know. Use the version that "
                "wrote it."
            )
        _set(config, key, value)
    config.trainer = dataclasses.replace(config.trainer)  # reads values of earlier versions
    check_config(config)
    return config


def override_keys(overrides: Sequence[str]) -> set[str]:
    """Keys and groups that overrides set.

    Raises:
        ConfigError: one is of a group that sets values of all sections.
    """
    keys = {text.partition("=")[0].lstrip("+") for text in overrides}
    for name in ("experiment", "preset", "mode", "smoke"):
        if name in keys:
            raise ConfigError(
                f"{name}: got a value, expected none: the config comes from the checkpoint. Override single groups, "
                "such as data=wikitext2, and keys."
            )
    return keys


def for_measuring(config: TrainConfig, given: set[str], tokenizer: Path | None = None) -> TrainConfig:
    """A copy for one process on this machine, over all validation samples, but for what ``given`` keys set.

    Args:
        tokenizer: file of the run, which is taken unless another one is given: where the run had it from may not be
            there any more.

    Raises:
        ConfigError: several devices are asked for.
    """
    for name in ("trainer.devices", "trainer.num_nodes"):
        if name in given and get_value(config, name) != 1:
            raise ConfigError(
                f"{name}: got {get_value(config, name)}, expected 1: a model is measured on one device."
            )
    trainer: dict[str, Any] = {
        "accelerator": "auto",
        "precision": "auto",
        "val_sequences": None,
        "compile": False,
    }
    trainer = {name: value for name, value in trainer.items() if f"trainer.{name}" not in given}
    trainer |= {"devices": 1, "num_nodes": 1, "global_batch_size": None, "accumulate_grad_batches": 1}
    changed = dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, **trainer),
        model=dataclasses.replace(config.model, warm_start=None, warm_start_skip=[]),
        tokenizer=dataclasses.replace(config.tokenizer),
    )
    if "tokenizer.name" in given:
        changed.tokenizer.path = None if "tokenizer.path" not in given else config.tokenizer.path
    elif "tokenizer.path" in given:
        changed.tokenizer.name = None
    elif tokenizer is not None:
        changed.tokenizer.name, changed.tokenizer.path = None, str(tokenizer)
    return changed


def _entry(group: str, saved: Mapping[str, Any], source: str) -> str:
    for name, schema in SCHEMAS[group].items():
        if schema.__name__ == saved.get(group):
            return name
    raise CheckpointError(
        f"{source}: its config has the {group} {saved.get(group)!r}, expected one of "
        f"{', '.join(schema.__name__ for schema in SCHEMAS[group].values())}. Use the version that wrote it."
    )


def _set(config: TrainConfig, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    setattr(get_value(config, section) if section else config, name, value)
