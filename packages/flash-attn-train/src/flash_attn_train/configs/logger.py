"""Options of the logger group: where metrics are written besides metrics.csv."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass, field

from flash_attn_train.configs.option import option, read_with, where


@dataclass
class WandbConfig:
    """Weights & Biases; needs flash-attn-train[wandb]."""

    enabled: bool = option(False, "also log to Weights & Biases")
    project: str = option("flash-attn-train", "project")
    entity: str | None = option(None, "user or team; null: the account's default")
    name: str | None = option(None, "name of the run; null: that of the run folder")
    tags: list[str] = option([], "tags of the run")
    offline: bool = option(False, "keep everything in the run folder, to send later with `wandb sync`")


@dataclass
class MLflowConfig:
    """MLflow; needs flash-attn-train[mlflow]."""

    enabled: bool = option(False, "also log to MLflow")
    experiment: str = option("flash-attn-train", "experiment")
    name: str | None = option(None, "name of the run; null: that of the run folder")
    tracking_uri: str | None = option(
        None, "server or database; null: MLFLOW_TRACKING_URI, or mlflow.db in the run folder"
    )


@dataclass
class CometConfig:
    """Comet; needs flash-attn-train[comet]."""

    enabled: bool = option(False, "also log to Comet")
    project: str = option("flash-attn-train", "project")
    workspace: str | None = option(None, "workspace; null: the account's default")
    name: str | None = option(None, "name of the experiment; null: that of the run folder")
    offline: bool = option(False, "keep everything in the run folder, to send later with `comet upload`")


@dataclass
class LoggerConfig:
    """metrics.csv is always written."""

    every_n_steps: int = option(
        10, "steps between records of training loss, rate, gradient norm and speed", at_least=1
    )
    tensorboard: bool = option(True, "also write TensorBoard event files")
    wandb: WandbConfig = field(
        default_factory=WandbConfig, metadata=read_with(where("logger.wandb.enabled", True))
    )
    mlflow: MLflowConfig = field(
        default_factory=MLflowConfig, metadata=read_with(where("logger.mlflow.enabled", True))
    )
    comet: CometConfig = field(
        default_factory=CometConfig, metadata=read_with(where("logger.comet.enabled", True))
    )
