"""From a config of the scheduler group to a scheduler for Lightning."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flash_attn_train.configs.scheduler import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    MultiStepConfig,
    PlateauConfig,
    PolyConfig,
    SchedulerConfig,
    StepConfig,
    WSDConfig,
)
from flash_attn_train.errors import ConfigError
from flash_attn_train.optim import schedule
from flash_attn_train.optim.plateau import WarmupPlateau
from flash_attn_train.optim.schedule import Schedule

# What the plateau schedule looks at.
MONITOR = "val/loss"


def build_scheduler(
    config: SchedulerConfig, optimizer: Optimizer, max_steps: int, *, val_every_n_steps: int | None = None
) -> dict[str, Any]:
    """The value of ``"lr_scheduler"`` in what Lightning's ``configure_optimizers`` returns.

    Args:
        config: kind and numbers; nulls are resolved with ``max_steps``.
        optimizer: its groups' rates are the peaks.
        max_steps: of the run.
        val_every_n_steps: optimizer steps between validations, for the plateau schedule.

    Raises:
        ConfigError: numbers that do not fit together.
    """
    if isinstance(config, PlateauConfig):
        if val_every_n_steps is None:
            raise TypeError(
                "val_every_n_steps: got None, expected the steps between validations for a PlateauConfig"
            )
        plateau = WarmupPlateau(
            optimizer,
            warmup_steps=_warmup_steps(config, max_steps),
            val_every_n_steps=val_every_n_steps,
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            min_lr_ratio=config.min_lr_ratio,
        )
        # Not strict: there is no validation loss before the first validation.
        return {
            "scheduler": plateau,
            "interval": "step",
            "reduce_on_plateau": True,
            "monitor": MONITOR,
            "strict": False,
        }
    return {"scheduler": LambdaLR(optimizer, make_schedule(config, max_steps)), "interval": "step"}


@functools.singledispatch
def make_schedule(config: SchedulerConfig, max_steps: int) -> Schedule:
    """The schedule of a config: optimizer step, from 0 -> factor on the peak learning rate.

    Raises:
        ConfigError: numbers that do not fit together.
    """
    raise TypeError(f"no schedule is a pure function of the step for a {type(config).__name__}")


@make_schedule.register
def _(config: ConstantConfig, max_steps: int) -> Schedule:
    return functools.partial(schedule.constant, warmup_steps=_warmup_steps(config, max_steps))


@make_schedule.register
def _(config: CosineConfig, max_steps: int) -> Schedule:
    return functools.partial(
        schedule.warmup_cosine, **_lengths(config, max_steps), min_lr_ratio=config.min_lr_ratio
    )


@make_schedule.register
def _(config: LinearConfig, max_steps: int) -> Schedule:
    return functools.partial(
        schedule.polynomial, **_lengths(config, max_steps), min_lr_ratio=config.min_lr_ratio
    )


@make_schedule.register
def _(config: PolyConfig, max_steps: int) -> Schedule:
    return functools.partial(
        schedule.polynomial,
        **_lengths(config, max_steps),
        min_lr_ratio=config.min_lr_ratio,
        power=config.power,
    )


@make_schedule.register
def _(config: InverseSqrtConfig, max_steps: int) -> Schedule:
    return functools.partial(
        schedule.inverse_sqrt,
        warmup_steps=_warmup_steps(config, max_steps),
        min_lr_ratio=config.min_lr_ratio,
    )


@make_schedule.register
def _(config: StepConfig, max_steps: int) -> Schedule:
    return functools.partial(
        schedule.step_decay,
        warmup_steps=_warmup_steps(config, max_steps),
        step_size=config.step_size,
        gamma=config.gamma,
    )


@make_schedule.register
def _(config: MultiStepConfig, max_steps: int) -> Schedule:
    milestones = tuple(config.milestones)
    if not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] < 1:
        raise ConfigError(
            f"scheduler.milestones: got {config.milestones}, expected at least one step, each after the one before, "
            "e.g. [3000,6000]; without reductions, scheduler=constant."
        )
    return functools.partial(
        schedule.multi_step,
        warmup_steps=_warmup_steps(config, max_steps),
        milestones=milestones,
        gamma=config.gamma,
    )


@make_schedule.register
def _(config: WSDConfig, max_steps: int) -> Schedule:
    lengths = _lengths(config, max_steps)
    warmup_steps, decay_steps = lengths["warmup_steps"], lengths["decay_steps"]
    cooldown_steps = config.cooldown_steps
    if cooldown_steps is None:
        cooldown_steps = max(1, decay_steps // 5)
    if warmup_steps + cooldown_steps > decay_steps:
        raise ConfigError(
            f"scheduler.cooldown_steps: got {cooldown_steps} after a warmup of {warmup_steps}, expected that both fit "
            f"into the schedule's {decay_steps} steps; shorten one of them, or raise scheduler.decay_steps."
        )
    return functools.partial(
        schedule.warmup_stable_decay,
        **lengths,
        cooldown_steps=cooldown_steps,
        cooldown=config.cooldown,
        min_lr_ratio=config.min_lr_ratio,
    )


def _lengths(config: SchedulerConfig, max_steps: int) -> dict[str, int]:
    return {
        "warmup_steps": _warmup_steps(config, max_steps),
        "decay_steps": config.decay_steps or max_steps,
    }


def _warmup_steps(config: SchedulerConfig, max_steps: int) -> int:
    length = config.decay_steps or max_steps
    warmup_steps = length // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps > length:
        raise ConfigError(
            f"scheduler.warmup_steps: got {warmup_steps}, expected at most {length}, the length of the schedule "
            "(scheduler.decay_steps, or trainer.max_steps where that is null)."
        )
    return warmup_steps
