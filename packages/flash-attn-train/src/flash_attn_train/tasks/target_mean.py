"""The mean over the targets of an optimizer step, whose forward passes have different numbers of them."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor


class TargetMean:
    """Makes the loss of a step the mean over its targets, however passes and processes divide them.

    Gradients of a step are means over its forward passes p and over processes, so means of the passes' losses would
    count a target for less the more of them its pass has. With the sum S_p of the losses of n_p targets, of c
    positions, a pass has the loss S_p / c here, and the step's gradients are multiplied by c / mean(n_p)::

        mean(S_p / c) * c / mean(n_p) = sum(S_p) / sum(n_p)
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._positions = 0

    def loss_of_pass(self, mean: Tensor, num_targets: Tensor, positions: int) -> Tensor:
        """S_p / c of a pass, from the mean S_p / n_p of its losses. 0 without targets, where that is NaN.

        ``positions``, of which some are targets, is the same in all passes, of all processes.
        """
        self._counts.append(num_targets)
        self._positions = positions
        return torch.where(num_targets > 0, mean * (num_targets / positions), 0.0)

    def factor_of_step(self, trainer: pl.Trainer) -> Tensor | None:
        """c / mean(n_p) over the passes of the step and all processes, after the last of them; None before.

        To be called once per pass, by all processes together. Of a step without any target, c.
        """
        if len(self._counts) < trainer.accumulate_grad_batches:
            return None
        mean = torch.stack(self._counts).float().mean()
        self._counts = []
        mean = trainer.strategy.reduce(mean, reduce_op="mean")
        assert isinstance(mean, Tensor)
        return self._positions / torch.where(mean > 0, mean, 1.0)
