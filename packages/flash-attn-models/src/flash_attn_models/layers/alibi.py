"""ALiBi: a linear penalty on the distance between query and key, with one slope for each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(n_head: int) -> list[float]:
    """Slopes of ``n_head`` heads: the geometric sequence from 2^(-8/n) to 2^-8 if n is a power of two; otherwise that
    of the next lower power, and then every second one of the next higher.

    Source: Press et al. 2022, "Train Short, Test Long" (arXiv 2108.12409), and the code published with it.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-4 * (2 * head + 1) / power) for head in range(n_head - power)]


class ALiBi:
    """The slopes as a float32 tensor (n_head,) on the device that asks for them.

    Neither a parameter nor a buffer, as the table of rotary positions is none: checkpoints do not hold it, casts leave
    it exact, and a model built on the meta device needs nothing loaded.

    Args:
        n_head: query heads.
        scale: multiplies every slope.
    """

    def __init__(self, n_head: int, scale: float = 1.0) -> None:
        self._values = [slope * scale for slope in alibi_slopes(n_head)]
        self._slopes = torch.tensor(self._values, dtype=torch.float32, device="cpu")

    @torch.inference_mode(False)  # slopes made while generating must serve training too
    def slopes(self, device: torch.device) -> Tensor:
        """(n_head,) float32."""
        if self._slopes.device != device:
            self._slopes = torch.tensor(self._values, dtype=torch.float32, device=device)
        return self._slopes
