"""The metrics of a task."""

from __future__ import annotations

from functools import singledispatch

from torchmetrics import Metric, MetricCollection

from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.task import (
    ImageClassificationConfig,
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
)
from flash_attn_train.metrics.accuracy import Accuracy
from flash_attn_train.metrics.loss import Loss, Perplexity


def build_metrics(config: MetricsConfig, task: TaskConfig) -> MetricCollection:
    """What a validation of this task measures, by name: "loss", and some of "perplexity", "accuracy", "accuracy_top5".

    ``update`` takes what the task's ``step`` returns. (Bits per byte are computed from the loss where the length of the
    text is known, in :class:`flash_attn_train.callbacks.Metrics`.)
    """
    return MetricCollection({"loss": Loss(), **_more(task, config)})


@singledispatch
def _more(task: TaskConfig, config: MetricsConfig) -> dict[str, Metric]:
    raise TypeError(f"task: got {type(task).__name__}, expected one of configs.task.TASKS.")


@_more.register
def _(task: LanguageModelConfig, config: MetricsConfig) -> dict[str, Metric]:
    return {"perplexity": Perplexity()} if config.perplexity else {}


@_more.register
def _(task: MaskedLMConfig, config: MetricsConfig) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {"perplexity": Perplexity()} if config.perplexity else {}
    return {**metrics, **_accuracy(config)}


@_more.register
def _(task: SequenceClassificationConfig, config: MetricsConfig) -> dict[str, Metric]:
    return _accuracy(config)


@_more.register
def _(task: ImageClassificationConfig, config: MetricsConfig) -> dict[str, Metric]:
    return {**_accuracy(config), **{f"accuracy_top{k}": Accuracy(k) for k in config.top_k}}


def _accuracy(config: MetricsConfig) -> dict[str, Metric]:
    return {"accuracy": Accuracy()} if config.accuracy else {}
