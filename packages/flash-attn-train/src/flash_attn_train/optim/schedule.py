"""The learning-rate schedule, a pure function of the step: resuming needs nothing but the step number."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Factor on the peak learning rate for the optimizer step number ``step`` (the first step is 0).

    Rises linearly, ``(step + 1) / warmup_steps``, reaching 1 at step ``warmup_steps - 1``; then
    ``min + (1 - min) * (1 + cos(pi * t)) / 2`` with t going from 0 to 1 at ``decay_steps`` (Loshchilov and
    Hutter, SGDR, 2017); then stays at ``min_lr_ratio``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= decay_steps:
        return min_lr_ratio
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
