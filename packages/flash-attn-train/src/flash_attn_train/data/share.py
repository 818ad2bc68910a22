"""Which samples a process takes: a pure function of the number of its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's part of the samples.

    Optimizer step s (from 0) uses the samples with ordinals s*G .. (s+1)*G - 1, where G = batch_size * accumulate *
    world_size is the global batch. Of these, micro batch a of rank r has (a * world_size + r) * batch_size + i, i in
    [0, batch_size). So the samples of a step do not depend on how many ranks share them.

    Attributes:
        batch_size: samples per forward pass and rank.
        accumulate: forward passes per optimizer step.
        first_sample: ordinal of the first sample of the first step of this process.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    first_sample: int = 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    def ordinals(self, number: int) -> np.ndarray:
        """Sample ordinals of the rank's micro batch ``number`` = 0, 1, ..., (batch_size,) int64."""
        step, micro_batch = divmod(number, self.accumulate)
        first = self.first_sample + step * self.global_batch
        place = (micro_batch * self.world_size + self.rank) * self.batch_size
        return first + place + np.arange(self.batch_size, dtype=np.int64)
