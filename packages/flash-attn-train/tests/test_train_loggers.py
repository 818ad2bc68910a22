"""Which loggers a config makes, and what they keep."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from flash_attn_train.configs.logger import CometConfig, LoggerConfig, MLflowConfig, WandbConfig
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import MetricsCSV, build_loggers, check_loggers, read_metrics
from flash_attn_train.loggers.identity import Identities
from pytorch_lightning.loggers import TensorBoardLogger

OPTIONS = {"seed": 1, "optimizer.lr": 0.1, "data.suffixes": [".py"], "data.path": None}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def log_twice(config: LoggerConfig, folder: Path) -> None:
    """Logs a step, and another one in a resumed session."""
    for first_step in (0, 1):
        for logger in build_loggers(config, folder, options=OPTIONS, first_step=first_step):
            logger.log_metrics({"train/loss": 3.0 - first_step}, step=first_step + 1)
            logger.save()
            logger.finalize("success")


def test_metrics_csv_is_always_there(tmp_path: Path) -> None:
    log_twice(LoggerConfig(tensorboard=False), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [3.0, 2.0]


def test_tensorboard_has_metrics_and_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice(LoggerConfig(), tmp_path)
    kinds = [
        type(logger) for logger in build_loggers(LoggerConfig(), tmp_path, options=OPTIONS, first_step=2)
    ]
    assert kinds == [MetricsCSV, TensorBoardLogger]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]
    assert "optimizer.lr: 0.1" in (tmp_path / "tensorboard/hparams.yaml").read_text()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet"])
def test_missing_package_names_its_extra(tmp_path: Path, name: str) -> None:
    if has({"comet": "comet_ml"}.get(name, name)):
        pytest.skip(f"{name} is installed")
    sections: dict[str, Any] = {"wandb": WandbConfig, "mlflow": MLflowConfig, "comet": CometConfig}
    config = LoggerConfig(tensorboard=False, **{name: sections[name](enabled=True)})
    with pytest.raises(ConfigError, match=rf"logger\.{name}\.enabled: .*flash-attn-train\[{name}\]"):
        build_loggers(config, tmp_path, options=OPTIONS)
    with pytest.raises(ConfigError, match=rf"logger\.{name}\.enabled: .*flash-attn-train\[{name}\]"):
        check_loggers(config)


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="an extra")
    config = LoggerConfig(tensorboard=False, wandb=WandbConfig(enabled=True, offline=True, tags=["a"]))
    log_twice(config, tmp_path)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    assert runs and all(run.name.endswith(identity) for run in runs)


def test_mlflow_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has("mlflow") or not has("sqlalchemy"):
        pytest.skip("needs mlflow, an extra")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_twice(LoggerConfig(tensorboard=False, mlflow=MLflowConfig(enabled=True)), tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = [run for (run,) in database.execute("select run_uuid from runs")]
        metrics = database.execute("select step, value from metrics order by step").fetchall()
        params = dict(database.execute("select key, value from params"))
    assert runs == [json.loads((tmp_path / "loggers.json").read_text())["mlflow"]]
    assert metrics == [(1, 3.0), (2, 2.0)]
    assert params["optimizer.lr"] == "0.1"


def test_identities_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "loggers.json"
    identities = Identities(file)
    assert identities.get("wandb") is None
    identities.put("wandb", "abc")
    identities.put("mlflow", "def")
    assert Identities(file).get("wandb") == "abc" and Identities(file).get("mlflow") == "def"


GROUP_FILES = ("csv", "tensorboard", "wandb", "mlflow", "comet", "many")


@pytest.mark.parametrize("name", GROUP_FILES)
def test_group_files_compose(name: str) -> None:
    from flash_attn_train.configs.store import compose

    composed = compose([f"logger={name}"])
    on = {key for key in ("wandb", "mlflow", "comet") if composed.logger[key].enabled}
    on |= {"tensorboard"} if composed.logger.tensorboard else set()
    assert on == {"csv": set(), "many": {"tensorboard", "wandb", "mlflow"}}.get(name, {name})


@pytest.mark.parametrize(
    "override",
    ["callbacks=none", "callbacks=ema", "callbacks=monitor", "metrics=loss", "callbacks.ema.enabled=true"],
)
def test_other_group_files_compose(override: str) -> None:
    from flash_attn_train.configs.store import compose

    composed = compose([override])
    assert composed.callbacks.ema.enabled == ("ema" in override)
    assert composed.callbacks.norms.per_layer == (override == "callbacks=monitor")
    assert composed.callbacks.speed.enabled == (override != "callbacks=none")
    assert composed.metrics.perplexity == (override != "metrics=loss")
