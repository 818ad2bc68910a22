"""A run that is interrupted anywhere and resumed computes what an uninterrupted one does, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_train.callbacks import EMA_KEY
from flash_attn_train.checkpoints import AtomicCheckpointIO, read_checkpoint
from flash_attn_train.configs import CallbacksConfig, LanguageModelConfig, TrainConfig
from flash_attn_train.configs.callbacks import EMAConfig
from flash_attn_train.configs.scheduler import PlateauConfig, WSDConfig
from flash_attn_train.loggers import read_metrics
from flash_attn_train.run import train

TIMES = ("tokens_per_s", "samples_per_s", "step_time_s", "data_wait")


def computed_rows(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without its speed."""
    rows = read_metrics(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def assert_same_state(left: Path, right: Path) -> None:
    one, other = read_checkpoint(left), read_checkpoint(right)
    assert one.keys() == other.keys()
    for weights in {"state_dict", EMA_KEY} & one.keys():
        assert one[weights].keys() == other[weights].keys()
        for name, tensor in one[weights].items():
            assert torch.equal(tensor, other[weights][name]), (weights, name)
    assert one["lr_schedulers"] == other["lr_schedulers"]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)


VARIANTS: dict[str, tuple[dict[str, Any], slice]] = {  # what differs, and which checkpoints are continued
    "plain": ({}, slice(None)),
    "accumulated": ({"trainer": {"accumulate_grad_batches": 2}}, slice(None)),
    "workers": ({"data": {"num_workers": 2}}, slice(1, 3)),
    "averaged": ({"callbacks": CallbacksConfig(ema=EMAConfig(enabled=True, decay=0.9))}, slice(1, 5)),
    "wsd": (
        {"scheduler": WSDConfig(warmup_steps=2, cooldown_steps=4)},
        slice(3, 5),
    ),  # before and in the cooldown
    "plateau": ({"scheduler": PlateauConfig(warmup_steps=2, patience=0, threshold=1.0)}, slice(2, 5)),
    "within": ({"task": LanguageModelConfig(documents="within")}, slice(2, 4)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_from_every_checkpoint_equals_not_stopping(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    changes, continued = VARIANTS[variant]
    # Intervals such that checkpoints fall with and without a validation at the same step, and neither
    # interval divides the last step; dropout, so that the random generators matter.
    steps = {"max_steps": 11, "val_every_n_steps": 4, **changes.get("trainer", {})}
    config = small_config(
        model={"dropout": 0.2, "attn_dropout": 0.1},
        checkpoint={"every_n_steps": 2},
        **{**changes, "trainer": steps},
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

    monkeypatch.setattr("flash_attn_train.trainer.AtomicCheckpointIO", Snapshotting)
    train(config)
    monkeypatch.undo()

    assert [read_checkpoint(s / "checkpoints/last.ckpt")["global_step"] for s in snapshots] == [
        2,
        4,
        6,
        8,
        10,
        11,
    ]
    expected = computed_rows(whole)
    assert [row["step"] for row in expected if "val/loss" in row] == [0, 4, 8, 11]
    for snapshot in snapshots[continued]:
        # A killed run may have logged a step that its last checkpoint does not have yet.
        names = (snapshot / "metrics.csv").read_text().splitlines()[0].split(",")
        with open(snapshot / "metrics.csv", "a") as file:
            file.write(f"99,99{',' * (len(names) - 2)}\n99,99,1.")
        config.output_dir, config.resume = str(snapshot), "true"
        train(config)
        assert computed_rows(snapshot) == expected
        assert_same_state(snapshot / "checkpoints/last.ckpt", whole / "checkpoints/last.ckpt")
        assert_same_state(snapshot / "checkpoints/best.ckpt", whole / "checkpoints/best.ckpt")


@pytest.mark.parametrize(("before", "after"), [((8, 1), (2, 4)), ((2, 4), (4, 2))])
def test_steps_of_another_number_of_forward_passes(
    small_config: Callable[..., TrainConfig], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """As another number of devices makes them: a step goes on with the same samples, and validations stay in place."""

    def config_of(folder: Path, batch_size: int, accumulate: int) -> TrainConfig:
        steps = {"max_steps": 5, "val_every_n_steps": 2}
        config = small_config(
            trainer={"batch_size": batch_size, "accumulate_grad_batches": accumulate, **steps},
            checkpoint={"keep_every_n_steps": 1},
        )
        config.output_dir = str(folder)
        return config

    whole = tmp_path / "whole"
    train(config_of(whole, *before))
    expected = computed_rows(whole)
    assert [row["step"] for row in expected if "val/loss" in row] == [0, 2, 4, 5]
    for step in (1, 2):  # without and with a validation after the step
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(whole, resumed)
        (resumed / "checkpoints/last.ckpt").unlink()
        (resumed / f"checkpoints/step-{step}.ckpt").rename(resumed / "checkpoints/last.ckpt")
        config = config_of(resumed, *after)
        config.resume = "true"
        train(config)
        rows = computed_rows(resumed)
        assert [(row["step"], "val/loss" in row) for row in rows] == [
            (row["step"], "val/loss" in row) for row in expected
        ]
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-3), step


KILLED_RUN = [
    *("model.dropout=0.2", "model.max_seqlen=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16"),
    *("trainer.max_steps=120", "trainer.val_every_n_steps=7", "trainer.val_sequences=8"),
    *("trainer.batch_size=4", "trainer.accelerator=cpu", "checkpoint.every_n_steps=5"),
    *("tokenizer.vocab_size=300", "logger.every_n_steps=1", "logger.tensorboard=false"),
    *("data.num_workers=2", "callbacks=ema", "scheduler=wsd", "scheduler.cooldown_steps=90"),
    "generation.max_new_tokens=4",
]


def test_killed_and_resumed_in_a_new_process(corpus_folder: Path, token_cache: Path, tmp_path: Path) -> None:
    """With worker processes, averaged weights and a schedule that the kill may come before, in or after a corner of."""

    def command(folder: str, *more: str) -> list[str]:
        data = [f"data.path={corpus_folder}", "data.val_fraction=0.2", f"data.cache_dir={token_cache}"]
        arguments = [*data, *KILLED_RUN, f"output_dir={tmp_path / folder}", *more]
        return [sys.executable, "-m", "flash_attn_train.cli", *arguments]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=200)

    # Long before the end, which the run must not reach before the kill does.
    kill_at = random.SystemRandom().randrange(6, 50)
    process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {kill_at}/"):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    killed_at = max(row["step"] for row in read_metrics(tmp_path / "killed/metrics.csv"))
    assert kill_at <= killed_at < 120

    resumed = subprocess.run(
        command("killed", "resume=true"), check=True, capture_output=True, text=True, timeout=200
    )
    continued_from = int(resumed.stdout.split("continuing from step ")[1].split()[0])
    # At most the checkpoint that was being written is missing.
    assert continued_from in range(5, 120, 5) and continued_from >= kill_at - 10
    assert computed_rows(tmp_path / "killed") == computed_rows(tmp_path / "whole"), kill_at
    assert_same_state(tmp_path / "killed/checkpoints/last.ckpt", tmp_path / "whole/checkpoints/last.ckpt")
