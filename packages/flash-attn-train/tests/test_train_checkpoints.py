"""Checkpoint files."""

from __future__ import annotations

import dataclasses
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_attn_train.checkpoints import (
    AtomicCheckpointIO,
    check_same_config,
    check_same_data,
    map_checkpoint,
    read_checkpoint,
    read_header,
)
from flash_attn_train.configs.checks import flatten
from flash_attn_train.configs.scheduler import CosineConfig
from flash_attn_train.configs.schema import TrainConfig, TrainerConfig
from flash_attn_train.configs.strategy import FSDP2Config, TensorParallelConfig, Zero1Config
from flash_attn_train.errors import CheckpointError
from flash_attn_train.rng import rng_state, set_rng_state


@pytest.fixture
def checkpoint_file(tmp_path: Path) -> Path:
    file = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 3, "weights": torch.arange(1000.0)}, file)
    return file


def test_round_trip_leaves_one_file(checkpoint_file: Path) -> None:
    loaded = AtomicCheckpointIO().load_checkpoint(checkpoint_file)
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["weights"], torch.arange(1000.0))
    assert [file.name for file in checkpoint_file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated(checkpoint_file: Path, kept: int) -> None:
    os.truncate(checkpoint_file, kept if kept >= 0 else checkpoint_file.stat().st_size - 1)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(checkpoint_file)
    for part in (str(checkpoint_file), "truncated or damaged", "Nothing was loaded", "resume=PATH"):
        assert part in str(error.value)


def test_changed_byte_in_the_weights(checkpoint_file: Path) -> None:
    content = bytearray(checkpoint_file.read_bytes())
    position = content.index(torch.arange(1000.0).numpy().tobytes()) + 2000
    content[position] ^= 1
    checkpoint_file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(checkpoint_file)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "other.ckpt"
    file.write_text("text")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "missing.ckpt")


class Anything:
    pass


def test_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"object": Anything()}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="Nothing was loaded"):
        read_checkpoint(tmp_path / "code.ckpt")


def test_failed_write_keeps_the_last_good_one(checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(checkpoint: Any, file: Any) -> None:
        file.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().save_checkpoint({"global_step": 4}, checkpoint_file)
    for part in (str(checkpoint_file), "No space left on device", "the one before is still there"):
        assert part in str(error.value)
    assert read_checkpoint(checkpoint_file)["global_step"] == 3
    assert [file.name for file in checkpoint_file.parent.iterdir()] == ["last.ckpt"]


FILE = Path("last.ckpt")


def some_config(**changes: dict[str, Any]) -> TrainConfig:
    """A resolved config with sections changed."""
    config = TrainConfig(
        trainer=TrainerConfig(max_steps=6, batch_size=4, accelerator="cpu", precision="32-true"),
        scheduler=CosineConfig(warmup_steps=1, decay_steps=6),
    )
    for name, change in changes.items():
        changed = dataclasses.replace(getattr(config, name), **change) if isinstance(change, dict) else change
        config = dataclasses.replace(config, **{name: changed})
    return config


def saved_by(config: TrainConfig, step: int = 3) -> dict[str, Any]:
    return {"config": flatten(config), "global_step": step, "data_key": "abc"}


def test_same_config_passes() -> None:
    check_same_config(FILE, saved_by(some_config()), some_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "elsewhere", "resume": "true"},
        {"logger": {"every_n_steps": 7, "tensorboard": True}},
        {"generation": {"prompt": "x"}},
        {"checkpoint": {"every_n_steps": 1}},
        {"data": {"cache_dir": None, "num_workers": 2}},
        {"trainer": {"val_every_n_steps": 1, "val_sequences": None}},
        {"trainer": {"max_steps": 12}},
        {"trainer": {"compile": True, "activation_checkpointing": "layers"}},
        {"trainer": {"devices": 2, "batch_size": 2}, "strategy": Zero1Config()},
        {"trainer": {"devices": 2, "num_nodes": 2, "batch_size": 1}, "strategy": FSDP2Config()},
        {"trainer": {"batch_size": 1, "accumulate_grad_batches": 4}},
        {"trainer": {"devices": 2}, "strategy": TensorParallelConfig()},
        {"trainer": {"batch_size": 2, "global_batch_size": 4}},
        {"trainer": {"profiler": "simple"}},
    ],
)
def test_what_does_not_change_the_computation_may_differ(changes: dict[str, Any]) -> None:
    check_same_config(FILE, saved_by(some_config()), some_config(**changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"n_layer": 2}}, "model.n_layer (checkpoint: 4, now: 2)"),
        ({"seed": 1}, "seed (checkpoint: 0, now: 1)"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr (checkpoint: 0.001, now: 0.5)"),
        ({"tokenizer": {"vocab_size": 400}}, "tokenizer.vocab_size (checkpoint: 4096, now: 400)"),
        (
            {"trainer": {"batch_size": 5}},
            "samples per step (checkpoint: 4, now: 5) by trainer.batch_size (checkpoint: 4, now: 5)",
        ),
        ({"trainer": {"devices": 2}}, "now: 8) by trainer.devices (checkpoint: 1, now: 2)"),
        (
            {"trainer": {"precision": "bf16-mixed"}},
            "trainer.precision (checkpoint: '32-true', now: 'bf16-mixed')",
        ),
        ({"scheduler": {"decay_steps": 12}}, "scheduler.decay_steps (checkpoint: 6, now: 12)"),
    ],
)
def test_other_config_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as error:
        check_same_config(FILE, saved_by(some_config()), some_config(**changes))
    assert "last.ckpt is of another config" in str(error.value) and field in str(error.value)


def test_a_tokenizer_may_be_elsewhere() -> None:
    """What it is decides about the data, which are compared by content."""
    at_home, elsewhere, by_name, another = (
        some_config(tokenizer=change)
        for change in (
            {"path": "a.json"},
            {"path": "b.json"},
            {"name": "gpt2"},
            {"name": "bert-base-uncased"},
        )
    )
    check_same_config(FILE, saved_by(at_home), elsewhere)
    check_same_config(FILE, saved_by(by_name), elsewhere)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.name \(checkpoint: 'gpt2', now: 'bert-base-uncased'\)"
    ):
        check_same_config(FILE, saved_by(by_name), another)
    with pytest.raises(
        CheckpointError, match=r"it was tokenizer\.path='a\.json'; now it is tokenizer\.path='b\.json'"
    ):
        check_same_data(FILE, saved_by(at_home), elsewhere, "abd")


def test_options_that_the_checkpoint_does_not_know_had_their_defaults() -> None:
    saved = saved_by(some_config())
    for key in ("model.qk_norm", "optimizer.eps", "trainer.gradient_clip_val"):
        del saved["config"][key]
    check_same_config(FILE, saved, some_config())
    with pytest.raises(CheckpointError, match=r"model\.qk_norm \(checkpoint: False, now: True\)"):
        check_same_config(FILE, saved, some_config(model={"qk_norm": True}))


def test_checkpoint_beyond_the_last_step() -> None:
    with pytest.raises(CheckpointError, match=r"at step 7, expected at most trainer\.max_steps=6"):
        check_same_config(FILE, saved_by(some_config(), step=7), some_config())


@pytest.mark.parametrize("read", [read_checkpoint, read_header, map_checkpoint])
def test_a_file_of_torchs_that_is_no_checkpoint(tmp_path: Path, read: Any) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: got a file with a list, expected one that"):
        read(tmp_path / "list.pt")


def test_foreign_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="has no config in it"):
        check_same_config(FILE, {"global_step": 1}, some_config())


def test_other_text() -> None:
    config = some_config(data={"path": "mine.txt"})
    check_same_data(FILE, saved_by(some_config()), config, "abc")
    with pytest.raises(CheckpointError, match=r"other training data: .*now it is data\.path='mine\.txt'"):
        check_same_data(FILE, saved_by(some_config()), config, "abd")


def test_random_generators_continue(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.randn()  # leaves a cached second value in the generator's state
    torch.save(rng_state(), tmp_path / "rng")
    expected = [draw(), float(np.random.randn())]
    set_rng_state(torch.load(tmp_path / "rng", weights_only=True))
    assert [draw(), float(np.random.randn())] == expected
