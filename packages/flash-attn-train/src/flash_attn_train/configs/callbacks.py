"""Options of the callbacks group: what watches a run."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass, field

from flash_attn_train.configs.option import option, read_with, where


@dataclass
class EMAConfig:
    """Exponential moving average of the weights: validated, saved, and used for the sample."""

    enabled: bool = option(False, "keep averaged weights")
    decay: float = option(0.9999, "share of the average that a step keeps", at_least=0.0, below=1.0)
    warmup: bool = option(True, "after n updates decay by no more than (1 + n) / (10 + n)")
    every_n_steps: int = option(1, "optimizer steps between updates of the average", at_least=1)


@dataclass
class SpeedConfig:
    """Time per step, tokens per second and device, MFU, wait for data, and peak memory."""

    enabled: bool = option(
        True,
        "log step time, tokens per second and device, MFU, wait for data and peak memory with every record",
    )
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of one device, for MFU; null: from a table by the device's name", above=0.0
    )


@dataclass
class NormsConfig:
    """Norms of weights and gradients."""

    enabled: bool = option(False, "log the norm of all weights; that of all gradients is always logged")
    per_layer: bool = option(False, "also log both norms of each layer")


@dataclass
class CausalityConfig:
    """Whether an output depends on later inputs, found with gradients at every validation."""

    enabled: bool = option(
        False, "at every validation check with gradients that no output depends on a later token"
    )
    on_leak: str = option(
        "raise",
        "if an output depends on a later token: stop the run, or only log it",
        choices=("raise", "log"),
    )


@dataclass
class NaNGuardConfig:
    """Limits of trainer.nan=skip."""

    max_skipped_in_a_row: int = option(
        10, "steps skipped one after the other before the run stops", at_least=1
    )


@dataclass
class EarlyStoppingConfig:
    """End of the run when validation no longer improves."""

    enabled: bool = option(False, "end the run when the monitored metric no longer improves")
    monitor: str = option("val/loss", "metric that must improve")
    mode: str = option("min", "whether lower or higher is better", choices=("min", "max"))
    patience: int = option(3, "validations without improvement before the run stops", at_least=1)
    min_delta: float = option(0.0, "smallest change that counts as improvement", at_least=0.0)


@dataclass
class CallbacksConfig:
    """What watches a run."""

    ema: EMAConfig = field(
        default_factory=EMAConfig, metadata=read_with(where("callbacks.ema.enabled", True))
    )
    speed: SpeedConfig = field(
        default_factory=SpeedConfig, metadata=read_with(where("callbacks.speed.enabled", True))
    )
    norms: NormsConfig = field(
        default_factory=NormsConfig, metadata=read_with(where("callbacks.norms.enabled", True))
    )
    causality: CausalityConfig = field(
        default_factory=CausalityConfig, metadata=read_with(where("callbacks.causality.enabled", True))
    )
    nan_guard: NaNGuardConfig = field(
        default_factory=NaNGuardConfig, metadata=read_with(where("trainer.nan", "skip"))
    )
    early_stopping: EarlyStoppingConfig = field(
        default_factory=EarlyStoppingConfig,
        metadata=read_with(where("callbacks.early_stopping.enabled", True)),
    )
    loss_scale: bool = option(True, "with trainer.precision=16-mixed, log the loss scale")
    gpu_affinity: bool = option(
        False, "run each process on the CPU cores next to its GPU; needs flash-attn-train[nvml]"
    )
    model_summary: bool = option(False, "print a table of the model's modules")
