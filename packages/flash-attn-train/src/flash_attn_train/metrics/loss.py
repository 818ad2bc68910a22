"""Loss over many batches, and what is computed from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from flash_attn_train.metrics.step import StepResult

# exp(700) is still a finite float64.
_LARGEST_EXPONENT = 700.0


class Loss(Metric):
    """Mean loss over the targets of all batches and processes, in nats.

    Sum of the losses of the targets over their number: a batch with fewer targets (the last one, or one with many
    ignored labels) counts less, and one without any counts nothing. Sums are in float64, also in a task that is
    converted to another format, as with trainer.precision=bf16-true.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    num_targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: StepResult) -> None:
        """Adds a batch."""
        count = output.num_targets
        total = output.loss.detach().double() * count
        self.loss_sum += torch.where(count > 0, total, torch.zeros_like(total))
        self.num_targets += count

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = ()) -> nn.Module:
        # Called by to(), half() and the like. The sum goes to another device, but into no other format.
        super()._apply(fn, exclude_state=("loss_sum", *exclude_state))
        self.loss_sum = self.loss_sum.to(self.device)
        self._defaults["loss_sum"] = torch.zeros_like(self.loss_sum)
        return self

    def compute(self) -> Tensor:
        """A float64 scalar; NaN if there was no target."""
        return self.loss_sum / self.num_targets


class Perplexity(Loss):
    """exp(loss), of the loss over all batches: not a mean of perplexities.

    (torchmetrics' own takes logits, and would compute the softmax over the vocabulary again.)
    """

    def compute(self) -> Tensor:
        """A float64 scalar, at most exp(700)."""
        return super().compute().clamp(max=_LARGEST_EXPONENT).exp()


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token, in bits per byte of text: comparable between tokenizers."""
    return loss / math.log(2.0) / bytes_per_token
