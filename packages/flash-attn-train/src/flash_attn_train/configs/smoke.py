"""What is left of a config that is only to be tried out: the same kind of everything, in seconds and offline."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

from flash_attn_train.configs.data import DataConfig, HubTextDataConfig, TextDataConfig, TokenizerConfig
from flash_attn_train.configs.image_data import DigitsDataConfig, ImageDataConfig
from flash_attn_train.configs.model import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ModelConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.scheduler import SchedulerConfig, WSDConfig
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.unread import reset_unread
from flash_attn_train.errors import ConfigError

_SEQLEN = 64
_HUGGING_FACE = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 64},
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
    },
}


def smoke(config: TrainConfig, *, keep: Iterable[str] = ()) -> TrainConfig:
    """A copy of the config with a tiny model of the same kind, data that need no network, and four steps.

    Args:
        config: not changed.
        keep: keys that a user has set, such as "trainer.max_steps": these are kept as they are.

    Raises:
        ConfigError: a key to be kept means nothing for the data that are used instead of the config's.
    """
    small = _shrink(config)
    reset_unread(small)
    for key in keep:
        _carry(config, small, key)
    return small


def _carry(source: TrainConfig, target: TrainConfig, key: str) -> None:
    """Sets a key of target to its value in source."""
    one: Any = source
    other: Any = target
    *path, name = key.split(".")
    for part in path:
        one, other = getattr(one, part), getattr(other, part)
        if isinstance(one, dict):  # a mapping's entries are taken over whole
            other.update(one)
            return
    if not hasattr(other, name):
        raise ConfigError(
            f"{key}: got {getattr(one, name)!r} with mode=smoke, which uses {type(other).__name__} in place of "
            f"{type(one).__name__}; leave it out, or choose data that need no network."
        )
    setattr(other, name, getattr(one, name))


def _shrink(config: TrainConfig) -> TrainConfig:
    config = copy.deepcopy(config)
    trainer = dataclasses.replace(
        config.trainer,
        max_steps=4,
        max_epochs=None,
        batch_size=2,
        global_batch_size=None,
        accumulate_grad_batches=1,
        val_every_n_steps=2,
        val_sequences=4,
        num_nodes=1,
    )
    return dataclasses.replace(
        config,
        model=_tiny(config.model),
        data=_offline(config.data),
        tokenizer=TokenizerConfig(vocab_size=512),
        optimizer=dataclasses.replace(config.optimizer, overrides=[]),  # they may name layers that are gone
        scheduler=_short(config.scheduler),
        trainer=trainer,
        checkpoint=dataclasses.replace(config.checkpoint, every_n_steps=2),
        logger=dataclasses.replace(config.logger, every_n_steps=1),
        generation=dataclasses.replace(config.generation, max_new_tokens=8),
    )


def _short(scheduler: SchedulerConfig) -> SchedulerConfig:
    short = dataclasses.replace(scheduler, warmup_steps=1, decay_steps=4)
    return dataclasses.replace(short, cooldown_steps=None) if isinstance(short, WSDConfig) else short


@singledispatch
def _tiny(model: ModelConfig) -> ModelConfig:
    raise TypeError(f"model: got {type(model).__name__}, expected a config of the model group.")


@_tiny.register
def _(model: GPTModelConfig) -> ModelConfig:
    grouped = model.n_head_kv is not None and model.n_head_kv < model.n_head
    return dataclasses.replace(
        model,
        warm_start=None,
        max_seqlen=_SEQLEN,
        n_layer=2,
        n_head=2,
        n_head_kv=1 if grouped else None,
        d_model=64,
        d_head=None,
        d_inner=None,
    )


@_tiny.register
def _(model: BertModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model, warm_start=None, max_seqlen=_SEQLEN, n_layer=2, n_head=2, d_model=64, d_inner=None
    )


@_tiny.register
def _(model: ViTModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model,
        warm_start=None,
        image_size=8,
        patch_size=2,
        channels=1,
        n_layer=2,
        n_head=2,
        d_model=32,
        d_inner=None,
    )


@_tiny.register
def _(model: HuggingFaceModelConfig) -> ModelConfig:
    shape = _HUGGING_FACE.get(model.model_type)
    if shape is None:
        raise ConfigError(
            f"model.model_type: got {model.model_type!r} with mode=smoke, which has small shapes of "
            f"{' and '.join(_HUGGING_FACE)} only; leave mode=smoke out and set model.config."
        )
    return dataclasses.replace(model, warm_start=None, max_seqlen=_SEQLEN, config=dict(shape))


@singledispatch
def _offline(data: DataConfig) -> DataConfig:
    """Data of the same kind that every machine has; others are taken as they are."""
    return data


@_offline.register
def _(data: HubTextDataConfig) -> DataConfig:
    return TextDataConfig(cache_dir=data.cache_dir, num_workers=data.num_workers)


@_offline.register
def _(data: ImageDataConfig) -> DataConfig:
    return DigitsDataConfig(num_workers=data.num_workers, num_aug_repeats=data.num_aug_repeats)
