"""Options of the scheduler group."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option


@dataclass
class SchedulerConfig:
    """What every schedule has: a linear warmup, and a length."""

    warmup_steps: int | None = option(
        None, "steps in which the rate rises to the peak; null: a tenth of the schedule", at_least=0
    )
    decay_steps: int | None = option(
        None,
        "length of the schedule, the step at which a decay ends; null: trainer.max_steps",
        at_least=1,
    )


@dataclass
class ConstantConfig(SchedulerConfig):
    """The peak after the warmup."""


@dataclass
class CosineConfig(SchedulerConfig):
    """Cosine decay."""

    min_lr_ratio: float = option(0.1, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class LinearConfig(SchedulerConfig):
    """Linear decay."""

    min_lr_ratio: float = option(0.0, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class PolyConfig(SchedulerConfig):
    """Decay by a power of the share of steps that are left."""

    power: float = option(2.0, "exponent; 1 is the linear decay", above=0.0)
    min_lr_ratio: float = option(0.0, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class InverseSqrtConfig(SchedulerConfig):
    """Decay by the square root of the step, without an end."""

    min_lr_ratio: float = option(0.0, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class StepConfig(SchedulerConfig):
    """A factor every so many steps."""

    step_size: int = option(100, "steps between two reductions, counted from the first step", at_least=1)
    gamma: float = option(0.1, "factor of a reduction", above=0.0, at_most=1.0)


@dataclass
class MultiStepConfig(SchedulerConfig):
    """A factor at each of some steps."""

    milestones: list[int] = option([], "steps at which the rate is reduced, e.g. [3000,6000]")
    gamma: float = option(0.1, "factor of a reduction", above=0.0, at_most=1.0)


@dataclass
class WSDConfig(SchedulerConfig):
    """Warmup, stable, decay: the peak until a short cooldown at the end."""

    cooldown_steps: int | None = option(
        None, "length of the decay, which ends at decay_steps; null: a fifth of the schedule", at_least=1
    )
    cooldown: str = option(
        "sqrt",
        "shape of the decay: 1 - sqrt(t), 1 - t, or half a cosine",
        choices=("sqrt", "linear", "cosine"),
    )
    min_lr_ratio: float = option(0.0, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


@dataclass
class PlateauConfig(SchedulerConfig):
    """A factor whenever the validation loss no longer falls."""

    factor: float = option(0.5, "factor of a reduction", above=0.0, below=1.0)
    patience: int = option(2, "validations without improvement that are let pass", at_least=0)
    threshold: float = option(1e-3, "relative fall that counts as improvement", at_least=0.0)
    min_lr_ratio: float = option(0.0, "lowest rate as a share of the peak", at_least=0.0, at_most=1.0)


# Config group `scheduler`: name on the command line -> schema.
SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    "constant": ConstantConfig,
    "cosine": CosineConfig,
    "linear": LinearConfig,
    "poly": PolyConfig,
    "inverse_sqrt": InverseSqrtConfig,
    "step": StepConfig,
    "multi_step": MultiStepConfig,
    "wsd": WSDConfig,
    "plateau": PlateauConfig,
}
