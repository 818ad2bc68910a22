"""A run that is interrupted anywhere and resumed computes what an uninterrupted one does, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flash_attn_train.checkpoints
import pytest
import torch
from flash_attn_train.checkpoints import AtomicCheckpointIO, read_checkpoint
from flash_attn_train.configs import TrainConfig
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run import train


def computed_rows(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without its speed."""
    rows = read_metrics(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def assert_same_state(left: Path, right: Path) -> None:
    one, other = read_checkpoint(left), read_checkpoint(right)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_from_every_checkpoint_equals_not_stopping(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    # Intervals such that checkpoints fall with and without a validation at the same step, and neither interval
    # divides the last step; dropout, so that the random generators matter.
    config = small_config(
        model={"dropout": 0.2, "attn_dropout": 0.1},
        trainer={"max_steps": 11, "val_every_n_steps": 4, "accumulate_grad_batches": accumulate},
        checkpoint={"every_n_steps": 2},
    )
    whole = Path(config.output_dir)
    snapshots: list[Path] = []

    class Snapshotting(AtomicCheckpointIO):
        """Keeps the run folder as it is right after each write of last.ckpt: all that a kill would leave."""

        def save_checkpoint(self, checkpoint: dict, path: object, storage_options: object = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            if Path(str(path)).name == "last.ckpt":
                snapshots.append(tmp_path / f"killed{len(snapshots)}")
                shutil.copytree(whole, snapshots[-1])

    monkeypatch.setattr("flash_attn_train.run.AtomicCheckpointIO", Snapshotting)
    train(config)
    monkeypatch.undo()

    assert [read_checkpoint(s / "checkpoints/last.ckpt")["global_step"] for s in snapshots] == [2, 4, 6, 8, 10, 11]
    expected = computed_rows(whole)
    assert [row["step"] for row in expected if "val/loss" in row] == [0, 4, 8, 11]
    for snapshot in snapshots:
        # A killed run may have logged a step that its last checkpoint does not have yet.
        with open(snapshot / "metrics.csv", "a") as file:
            file.write("99,99,1.0,1.0,1.0,1.0,,,\n99,99,1.")
        config.output_dir, config.resume = str(snapshot), "true"
        train(config)
        assert computed_rows(snapshot) == expected
        assert_same_state(snapshot / "checkpoints/last.ckpt", whole / "checkpoints/last.ckpt")
        assert_same_state(snapshot / "checkpoints/best.ckpt", whole / "checkpoints/best.ckpt")
