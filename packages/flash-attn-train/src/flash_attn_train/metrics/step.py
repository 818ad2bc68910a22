"""What metrics need to know of a batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IGNORED_LABEL = -100


class StepResult(Protocol):
    """See :class:`flash_attn_train.tasks.task.StepOutput`."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def num_targets(self) -> Tensor: ...

    @property
    def logits(self) -> Tensor | None: ...

    @property
    def labels(self) -> Tensor: ...
