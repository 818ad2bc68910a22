"""The loggers that a config asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from flash_attn_train.configs.logger import CometConfig, LoggerConfig, MLflowConfig, WandbConfig
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers.columns import FIRST_COLUMNS
from flash_attn_train.loggers.identity import Identities
from flash_attn_train.loggers.metrics_csv import MetricsCSV

# Name in the logger group -> what is imported for it.
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}


def check_loggers(config: LoggerConfig) -> None:
    """Whether the packages of all loggers are there, which writes and connects nothing.

    Raises:
        ConfigError: one is not installed.
    """
    for name, package in _PACKAGES.items():
        if getattr(config, name).enabled and find_spec(package) is None:
            raise _not_installed(name, f"No module named {package!r}")


def build_loggers(
    config: LoggerConfig, folder: Path, *, options: Mapping[str, Any], first_step: int = 0
) -> list[Logger]:
    """``metrics.csv``, and what else the config asks for. Only the process of rank 0 writes or connects.

    A resumed run (``first_step`` > 0) continues the files, and the records at the servers, of the session before;
    what metrics.csv and TensorBoard have of later steps is dropped.

    Args:
        folder: of the run.
        options: the whole config, dotted key -> value, to be saved with each record.
        first_step: optimizer steps that are done already.

    Raises:
        ConfigError: a logger's package is not installed, or it cannot start (no network, no key); naming the way out.
    """
    loggers: list[Logger] = [MetricsCSV(folder / "metrics.csv", FIRST_COLUMNS, resume_step=first_step)]
    if config.tensorboard:
        loggers.append(
            TensorBoardLogger(
                folder, name="", version="tensorboard", purge_step=first_step + 1, default_hp_metric=False
            )
        )
    identities = Identities(folder / "loggers.json")
    if config.wandb.enabled:
        loggers.append(_guarded("wandb", _wandb, config.wandb, folder, identities))
    if config.mlflow.enabled:
        loggers.append(_guarded("mlflow", _mlflow, config.mlflow, folder, identities))
    if config.comet.enabled:
        loggers.append(_guarded("comet", _comet, config.comet, folder, identities))
    for logger in loggers:
        logger.log_hyperparams(dict(options))
    return loggers


def _guarded(name: str, build: Any, config: Any, folder: Path, identities: Identities) -> Logger:
    """Builds a logger; whatever it raises becomes one line."""
    try:
        return build(config, folder, identities)
    except ModuleNotFoundError as error:
        raise _not_installed(name, str(error)) from error
    except Exception as error:  # each library has its own, for keys, networks and names
        raise ConfigError(
            f"logger.{name}: cannot start: {error}. Log in as its documentation says, or set "
            f"logger.{name}.offline=true where it has that, or logger.{name}.enabled=false."
        ) from error


def _not_installed(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"logger.{name}.enabled: got true, but a package for it is not installed ({why}); pip install "
        f"flash-attn-train[{name}]."
    )


@rank_zero_only
def _keep(identities: Identities, server: str, identity: Callable[[], str]) -> None:
    identities.put(server, identity())


def _wandb(config: WandbConfig, folder: Path, identities: Identities) -> Logger:
    logger = WandbLogger(
        name=config.name or folder.name,
        save_dir=folder,
        id=identities.get("wandb"),
        project=config.project,
        offline=config.offline,
        entity=config.entity,
        tags=list(config.tags),
        settings=_wandb_settings(),
        resume=None if config.offline else "allow",
    )
    _keep(identities, "wandb", lambda: logger.experiment.id)
    return logger


def _wandb_settings() -> Any:
    # Its own lines and its copy of the terminal are in the way of ours.
    return import_module("wandb").Settings(silent=True, console="off")


def _mlflow(config: MLflowConfig, folder: Path, identities: Identities) -> Logger:
    default = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    logger = MLFlowLogger(
        experiment_name=config.experiment,
        run_name=config.name or folder.name,
        run_id=identities.get("mlflow"),
        tracking_uri=config.tracking_uri or default,
        artifact_location=str((folder / "mlflow").resolve()),
    )
    _keep(identities, "mlflow", lambda: str(logger.run_id))  # this creates the run
    return logger


def _comet(config: CometConfig, folder: Path, identities: Identities) -> Logger:
    options: dict[str, Any] = {"offline_directory": str(folder / "comet")} if config.offline else {}
    logger = CometLogger(
        workspace=config.workspace,
        project=config.project,
        name=config.name or folder.name,
        online=not config.offline,
        experiment_key=None if config.offline else identities.get("comet"),
        **options,
    )
    _keep(identities, "comet", lambda: logger.experiment.get_key())
    return logger
