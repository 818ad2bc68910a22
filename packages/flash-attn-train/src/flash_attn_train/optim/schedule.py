"""Learning-rate schedules as pure functions of the step: resuming needs nothing but the step number.

Each gives the factor on the peak learning rate for an optimizer step, the first of which is 0. All begin with the same
linear warmup, ``(step + 1) / warmup_steps``, which reaches 1 at step ``warmup_steps - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def warmup(step: int, warmup_steps: int) -> float:
    """The factor of the warmup, 1 from its end on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, *, warmup_steps: int) -> float:
    return warmup(step, warmup_steps)


def warmup_cosine(step: int, *, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Half a cosine from the end of the warmup to ``min_lr_ratio`` at ``decay_steps``, and that from there on.

    Source: Loshchilov and Hutter, SGDR, 2017, arXiv:1608.03983.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    left = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, decay_steps)))
    return min_lr_ratio + (1.0 - min_lr_ratio) * left


def polynomial(
    step: int, *, warmup_steps: int, decay_steps: int, min_lr_ratio: float, power: float = 1.0
) -> float:
    """(1 - t)^power, with t from 0 at the end of the warmup to 1 at ``decay_steps``; linear by default."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    left = (1.0 - _progress(step, warmup_steps, decay_steps)) ** power
    return min_lr_ratio + (1.0 - min_lr_ratio) * left


def inverse_sqrt(step: int, *, warmup_steps: int, min_lr_ratio: float) -> float:
    """sqrt(warmup_steps / (step + 1)) after the warmup (one step long at least).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 5.3.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return max(min_lr_ratio, math.sqrt(max(1, warmup_steps) / (step + 1)))


def step_decay(step: int, *, warmup_steps: int, step_size: int, gamma: float) -> float:
    """A factor ``gamma`` at every multiple of ``step_size``, times the warmup."""
    return warmup(step, warmup_steps) * gamma ** (step // step_size)


def multi_step(step: int, *, warmup_steps: int, milestones: Sequence[int], gamma: float) -> float:
    """A factor ``gamma`` from each of the ``milestones`` on, times the warmup."""
    return warmup(step, warmup_steps) * gamma ** sum(step >= milestone for milestone in milestones)


def warmup_stable_decay(
    step: int,
    *,
    warmup_steps: int,
    decay_steps: int,
    cooldown_steps: int,
    cooldown: str,
    min_lr_ratio: float,
) -> float:
    """1 until ``decay_steps - cooldown_steps``, then down to ``min_lr_ratio`` at ``decay_steps``.

    The checkpoint before the cooldown can be trained on for longer: nothing before it depends on where the schedule
    ends. Sources: Hu et al. 2024 (MiniCPM), arXiv:2404.06395; Haegele et al. 2024, arXiv:2405.18392 (shape "sqrt").
    """
    start = decay_steps - cooldown_steps
    if step < start:
        return warmup(step, warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * COOLDOWNS[cooldown](_progress(step, start, decay_steps))


# Shape of a cooldown: progress from 0 to 1 -> what is left, from 1 to 0.
COOLDOWNS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def _progress(step: int, start: int, end: int) -> float:
    return 1.0 if step >= end else (step - start) / (end - start)
