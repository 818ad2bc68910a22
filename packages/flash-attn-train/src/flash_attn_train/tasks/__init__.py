"""What a model is trained to do: one Lightning module per entry of the task group."""

from flash_attn_train.configs import (
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
    TrainConfig,
)
from flash_attn_train.models import DataSizes
from flash_attn_train.tasks.image_classification import ImageClassification
from flash_attn_train.tasks.language_model import LanguageModel
from flash_attn_train.tasks.masked_lm import MaskedLM
from flash_attn_train.tasks.sequence_classification import SequenceClassification
from flash_attn_train.tasks.task import StepOutput, Task

__all__ = [
    "ImageClassification",
    "LanguageModel",
    "MaskedLM",
    "SequenceClassification",
    "StepOutput",
    "Task",
    "build_task",
]

_TASKS: dict[type[TaskConfig], type[Task]] = {
    LanguageModelConfig: LanguageModel,
    MaskedLMConfig: MaskedLM,
    SequenceClassificationConfig: SequenceClassification,
    ImageClassificationConfig: ImageClassification,
}


def build_task(config: TrainConfig, sizes: DataSizes) -> Task:
    """The Lightning module of the config's task, for data of these sizes."""
    return _TASKS[type(config.task)](config, sizes)
