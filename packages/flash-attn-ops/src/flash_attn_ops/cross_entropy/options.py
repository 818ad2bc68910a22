"""What a row's loss depends on besides logits and label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCHEMA = (
    "float label_smoothing, float logit_scale, float z_loss, SymInt ignore_index, SymInt class_start, "
    "SymInt num_classes"
)  # of an operator that takes the options one by one


class Options(NamedTuple):
    """The options of :func:`~flash_attn_ops.cross_entropy.cross_entropy`, and which classes the columns are.

    Column c is class ``class_start + c``. Of the columns only those of classes below ``num_classes`` count, and those
    classes are all that there are; other columns are padding, or other processes have them.
    """

    label_smoothing: float
    logit_scale: float
    z_loss: float
    ignore_index: int
    class_start: int
    num_classes: int

    def columns_that_count(self, columns: int) -> int:
        return min(max(self.num_classes - self.class_start, 0), columns)


def loss_of(maximum: Tensor, log_total: Tensor, target: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Losses from the two parts of the log-sum-exp and the target; see :mod:`.reference`.

    The maximum is taken off the target before the small logarithm comes in, for the sake of large logits.
    """
    loss = (maximum - target) + log_total
    if options.z_loss:
        loss = loss + options.z_loss * (maximum + log_total).square()
    return torch.where(labels == options.ignore_index, 0.0, loss)
