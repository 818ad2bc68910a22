"""Options of the metrics group: what validation measures besides the loss."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option, where


@dataclass
class MetricsConfig:
    """The loss is always measured; each task takes what it has a meaning for."""

    perplexity: bool = option(
        True,
        "exp(loss) of tasks that predict tokens",
        where("task", "language_model", "masked_lm"),
        off=False,
    )
    bits_per_byte: bool = option(
        True, "loss in bits per byte of text, of language models", where("task", "language_model"), off=False
    )
    accuracy: bool = option(
        True,
        "share of right predictions, of classification and masked tokens",
        where("task", "masked_lm", "sequence_classification", "image_classification"),
        off=False,
    )
    top_k: list[int] = option(
        [5],
        "of image classification, also how often the class is among the k likeliest",
        where("task", "image_classification"),
        off=[],
    )
