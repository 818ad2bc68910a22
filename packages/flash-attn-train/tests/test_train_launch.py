"""Which process this is, what one decides for all, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as pl
from flash_attn_train.distributed import Interruption, launch, requeue_job


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC", "FLASH_ATTN_TRAIN")) or name in (
            "LOCAL_RANK",
            "RANK",
            "WORLD_SIZE",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "_decisions", 0)
    yield monkeypatch
    for name in list(os.environ):
        if name.startswith("FLASH_ATTN_TRAIN_DECISION"):
            del os.environ[name]


def where() -> tuple[int, int, int]:
    return launch.rank(), launch.local_rank(), launch.world_size()


def test_one_process() -> None:
    assert where() == (0, 0, 1)
    assert launch.is_rank_zero() and not launch.is_lightning_child()


def test_torchrun(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        environment.setenv(name, value)
    assert where() == (5, 1, 8)
    assert not launch.is_rank_zero() and not launch.is_lightning_child()


def test_slurm(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }.items():
        environment.setenv(name, value)
    assert where() == (9, 1, 16)
    slurm = cast(Any, launch.cluster_environment())
    assert slurm.auto_requeue is False


def test_what_the_first_process_decided_is_heard_by_those_that_lightning_starts(
    environment: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise OSError("no room")

    assert launch.on_rank_zero(lambda: {"folder": "runs/1"}) == {"folder": "runs/1"}
    with pytest.raises(OSError, match="no room"):
        launch.on_rank_zero(fail)
    assert launch.on_rank_zero(lambda: 3) == 3

    environment.setattr(launch, "_decisions", 0)  # the other process counts from the start
    environment.setenv("LOCAL_RANK", "1")
    environment.setenv("WORLD_SIZE", "2")
    assert where() == (1, 1, 2) and launch.is_lightning_child()

    def never() -> Any:
        raise AssertionError("called in the wrong process")

    assert launch.on_rank_zero(never) == {"folder": "runs/1"}
    with pytest.raises(OSError, match="no room"):
        launch.on_rank_zero(never)
    assert launch.on_rank_zero(never) == 3
    with pytest.raises(RuntimeError, match="start the run with torchrun"):
        launch.on_rank_zero(never)


def test_decisions_are_small() -> None:
    with pytest.raises(ValueError, match="at most 65536; return a path"):
        launch.on_rank_zero(lambda: "x" * 70000)


def test_errors_that_cannot_travel() -> None:
    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match="Local: here"):
        launch._value(launch._pickled(None, Local("here")))


def trainer() -> pl.Trainer:
    return cast(pl.Trainer, SimpleNamespace(world_size=1))


def test_signals_are_remembered_until_asked_for(environment: pytest.MonkeyPatch) -> None:
    interruption, before = Interruption(), signal.getsignal(signal.SIGTERM)
    interruption.install(trainer())
    assert interruption.requested() is None
    signal.raise_signal(signal.SIGTERM)
    assert interruption.requested() == signal.SIGTERM
    interruption.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_warning_of_slurm(environment: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    interruption = Interruption()
    interruption.install(trainer())
    assert signal.getsignal(signal.SIGUSR1) is before  # not under SLURM
    interruption.restore()
    environment.setenv("SLURM_JOB_ID", "77")
    interruption.install(trainer())
    signal.raise_signal(signal.SIGUSR1)
    assert interruption.requested() == signal.SIGUSR1
    interruption.restore()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_requeueing(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_JOB_ID", "77")
    asked: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> None:
        asked.append(command)

    environment.setattr(subprocess, "run", run)
    assert requeue_job() == "SLURM job 77 is requeued; with resume=auto it continues"
    environment.setenv("SLURM_ARRAY_JOB_ID", "70")
    environment.setenv("SLURM_ARRAY_TASK_ID", "4")
    requeue_job()
    assert asked == [["scontrol", "requeue", "77"], ["scontrol", "requeue", "70_4"]]

    def missing(command: list[str], **kwargs: Any) -> None:
        raise FileNotFoundError("scontrol")

    environment.setattr(subprocess, "run", missing)
    assert requeue_job() == "SLURM job 70_4 could not be requeued: scontrol"
