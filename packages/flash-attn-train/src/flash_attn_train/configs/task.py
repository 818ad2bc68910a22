"""Options of the task group: what the model learns to do."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option, unless


@dataclass
class TaskConfig:
    """What every task has."""


@dataclass
class LanguageModelConfig(TaskConfig):
    """Next-token prediction."""

    documents: str = option(
        "across",
        "across: a token sees all tokens before it in its sequence; within: only those of its own document",
        choices=("across", "within"),
    )


@dataclass
class MaskedLMConfig(TaskConfig):
    """Prediction of hidden tokens (BERT)."""

    mask_probability: float = option(0.15, "share of tokens to predict", above=0.0, below=1.0)
    keep_probability: float = option(0.1, "share of these left as they are", at_least=0.0, at_most=1.0)
    random_probability: float = option(
        0.1,
        "share of these replaced by a random token; the rest become the mask token",
        at_least=0.0,
        at_most=1.0,
    )


@dataclass
class SequenceClassificationConfig(TaskConfig):
    """One label for each text."""

    label_smoothing: float = option(0.0, "probability mass spread over all classes", at_least=0.0, below=1.0)


@dataclass
class ImageClassificationConfig(TaskConfig):
    """One label for each image."""

    label_smoothing: float = option(0.0, "probability mass spread over all classes", at_least=0.0, below=1.0)
    mixup_alpha: float = option(0.0, "parameter of mixup's Beta distribution; 0: no mixup", at_least=0.0)
    cutmix_alpha: float = option(0.0, "parameter of cutmix's Beta distribution; 0: no cutmix", at_least=0.0)
    mix_probability: float = option(
        1.0,
        "share of batches that are mixed, where mixup or cutmix is on",
        unless("task.mixup_alpha", "task.cutmix_alpha", equal=0.0),
        at_least=0.0,
        at_most=1.0,
    )


# Config group `task`: name on the command line -> schema.
TASKS: dict[str, type[TaskConfig]] = {
    "language_model": LanguageModelConfig,
    "masked_lm": MaskedLMConfig,
    "sequence_classification": SequenceClassificationConfig,
    "image_classification": ImageClassificationConfig,
}
