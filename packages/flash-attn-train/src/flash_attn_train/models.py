"""From the options of the model group to a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from flash_attn_models.bert import BertConfig, BertForMaskedLM
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.vit import ViTConfig, ViTForImageClassification
from torch import nn

from flash_attn_train.configs.model import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ModelConfig,
    ViTModelConfig,
)
from flash_attn_train.errors import ConfigError


@dataclass(frozen=True)
class DataSizes:
    """What data decide about a model: tokens that exist, or classes; 0 where there are none."""

    vocab_size: int = 0
    num_classes: int = 0


@singledispatch
def build_model(config: ModelConfig, sizes: DataSizes, **options: Any) -> nn.Module:
    """A model with random weights, from torch's global generator.

    Args:
        config: options of the model group.
        sizes: of the data.
        options: passed on to the model's constructor, such as ``device``, ``process_group``.

    Raises:
        ConfigError: the options do not make a model; naming the one and the way out.
    """
    raise TypeError(f"config: got {type(config).__name__}, expected a config of the model group.")


@build_model.register
def _(config: GPTModelConfig, sizes: DataSizes, **options: Any) -> nn.Module:
    return GPTLMHeadModel(gpt_config(config, sizes), **options)


@build_model.register
def _(config: BertModelConfig, sizes: DataSizes, **options: Any) -> nn.Module:
    from flash_attn_train.sequence_classifier import BertForSequenceClassification

    model = bert_config(config, sizes)
    if sizes.num_classes:
        return BertForSequenceClassification(model, sizes.num_classes, **options)
    return BertForMaskedLM(model, **options)


@build_model.register
def _(config: ViTModelConfig, sizes: DataSizes, **options: Any) -> nn.Module:
    return ViTForImageClassification(vit_config(config, sizes), **options)


@build_model.register
def _(config: HuggingFaceModelConfig, sizes: DataSizes, **options: Any) -> nn.Module:
    from flash_attn_train.hugging_face import build_hugging_face_model

    if options:
        raise ConfigError(f"model: a model of transformers cannot be made with {', '.join(options)}.")
    return build_hugging_face_model(config, sizes.vocab_size)


def gpt_config(config: GPTModelConfig, sizes: DataSizes) -> GPTConfig:
    """The architecture of the models package that the options describe."""
    fields = _own_fields(config, "rotary_fraction", "rotary_scaling", "pad_vocab_multiple")
    fields["rotary_scaling"] = config.rotary_scaling or None
    if config.position == "rotary" and config.rotary_fraction != 1.0:
        width = config.d_head or config.d_model // config.n_head
        fields["rotary_dim"] = 2 * round(width * config.rotary_fraction / 2)
    return _checked(GPTConfig, vocab_size=_padded(sizes.vocab_size, config.pad_vocab_multiple), **fields)


def bert_config(config: BertModelConfig, sizes: DataSizes) -> BertConfig:
    """The architecture of the models package that the options describe."""
    fields = _own_fields(config, "pad_vocab_multiple")
    return _checked(BertConfig, vocab_size=_padded(sizes.vocab_size, config.pad_vocab_multiple), **fields)


def vit_config(config: ViTModelConfig, sizes: DataSizes) -> ViTConfig:
    """The architecture of the models package that the options describe."""
    fields = _own_fields(config, "channels", "pool")
    return _checked(
        ViTConfig, n_channels=config.channels, pooling=config.pool, n_classes=sizes.num_classes, **fields
    )


def _own_fields(config: ModelConfig, *others: str) -> dict[str, Any]:
    """The options that the models package knows under the same name."""
    left_out = {"warm_start", "warm_start_skip", *others}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def _padded(vocab_size: int, multiple: int) -> int:
    return math.ceil(vocab_size / multiple) * multiple


def _checked(architecture: type, **fields: Any) -> Any:
    try:
        return architecture(**fields)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
