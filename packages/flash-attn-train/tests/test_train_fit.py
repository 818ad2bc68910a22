"""Values of different sections that do not fit together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from flash_attn_train.configs import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    ModelConfig,
    SequenceClassificationConfig,
    TaskConfig,
    TrainConfig,
    TrainerConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.fit import check_together
from flash_attn_train.configs.model import MODELS
from flash_attn_train.configs.scheduler import CosineConfig
from flash_attn_train.configs.task import TASKS
from flash_attn_train.errors import ConfigError

FITTING = {
    LanguageModelConfig: {GPTModelConfig, HuggingFaceModelConfig},
    MaskedLMConfig: {BertModelConfig},
    SequenceClassificationConfig: {BertModelConfig},
    ImageClassificationConfig: {ViTModelConfig},
}


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("task", TASKS.values())
def test_models_that_can_learn_a_task(task: type[TaskConfig], model: type[ModelConfig]) -> None:
    config = TrainConfig(task=task(), model=model())
    if model in FITTING[task]:
        check_together(config)
        return
    with pytest.raises(
        ConfigError, match=f"model: got {model.__name__} for the task {task.__name__}, expected"
    ):
        check_together(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": LanguageModelConfig(documents="within"), "model": HuggingFaceModelConfig()},
            r"task\.documents: got 'within' with a model of transformers, expected 'across'",
        ),
        (
            {"model": GPTModelConfig(n_head=3)},
            r"model\.d_model: got 256, expected a multiple of model\.n_head \(3\)",
        ),
        (
            {"model": GPTModelConfig(n_head_kv=3)},
            r"model\.n_head_kv: got 3, expected a divisor of model\.n_head \(4\)",
        ),
        (
            {"task": MaskedLMConfig(), "model": BertModelConfig(n_head=5)},
            r"model\.d_model: got 768, expected a multiple of model\.n_head \(5\)",
        ),
        (
            {"task": ImageClassificationConfig(), "model": ViTModelConfig(patch_size=15)},
            r"model\.image_size: got 224, expected a multiple of model\.patch_size \(15\)",
        ),
        (
            {"trainer": TrainerConfig(global_batch_size=32, accumulate_grad_batches=2)},
            r"trainer\.accumulate_grad_batches: got 2, expected to be left out with trainer\.global_batch_size=32",
        ),
        (
            {"scheduler": CosineConfig(warmup_steps=600)},
            r"scheduler\.warmup_steps: got 600, expected at most 500, the length of the schedule",
        ),
    ],
)
def test_both_sides_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_together(dataclasses.replace(TrainConfig(), **changes))


def test_what_fits_after_all() -> None:
    check_together(TrainConfig(model=GPTModelConfig(n_head=3, d_head=64)))
    check_together(TrainConfig(model=GPTModelConfig(n_head=6, n_head_kv=3, d_model=384)))
    check_together(TrainConfig(scheduler=CosineConfig(warmup_steps=600, decay_steps=1000)))
