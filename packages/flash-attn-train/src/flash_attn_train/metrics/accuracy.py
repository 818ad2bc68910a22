"""How often the right class is among the likeliest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flash_attn_train.metrics.step import IGNORED_LABEL, StepResult


class Accuracy(Metric):
    """Share of targets whose class is among the ``top_k`` with the largest logits.

    Labels may be probabilities of the classes, as mixup and cutmix make them: the likeliest one is then the right one.
    Targets with label -100 do not count. Nothing waits for the device. (torchmetrics' MulticlassAccuracy takes no
    probabilities, must know the number of classes, and waits to check its arguments.)

    Args:
        top_k: if the logits have fewer classes, all of them.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    num_right: Tensor
    num_targets: Tensor

    def __init__(self, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top_k = top_k
        self.add_state("num_right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: StepResult) -> None:
        """Adds a batch: logits (..., C); labels (...) integers, or (..., C) probabilities.

        Raises:
            ValueError: the task gave no logits.
        """
        logits, labels = output.logits, output.labels
        if logits is None:
            raise ValueError(
                "output.logits: got None, expected logits. Leave accuracy out (metrics.accuracy=false)."
            )
        if labels.is_floating_point():
            labels = labels.argmax(dim=-1)
        likeliest = logits.detach().topk(min(self.top_k, logits.shape[-1]), dim=-1).indices
        self.num_right += (likeliest == labels[..., None]).any(dim=-1).sum()  # never so for an ignored label
        self.num_targets += (labels != IGNORED_LABEL).sum()

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN if there was no target."""
        return self.num_right.double() / self.num_targets
