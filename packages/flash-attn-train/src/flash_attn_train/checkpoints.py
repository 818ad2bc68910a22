"""Reading and writing checkpoint files, and whether a checkpoint belongs to a config."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import CheckpointIO

from flash_attn_train.atomic import atomic_write
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.checks import flatten
from flash_attn_train.errors import CheckpointError

# Keys that do not change what is computed from the checkpoint on, or (the last ones) whose effect on it is
# checked otherwise: the corpus by its content, the length of the schedule by scheduler.decay_steps.
_MAY_DIFFER = (
    "output_dir",
    "resume",
    "logging.",
    "checkpoint.",
    "generation.",
    "trainer.accelerator",
    "trainer.val_every_n_steps",
    "trainer.val_sequences",
    "data.cache_dir",
    "data.num_workers",
    "data.",
    "trainer.max_steps",
)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's file access: a checkpoint is complete on disk before it replaces the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options: got {storage_options!r}, expected None for local files.")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            kept = "; the one before is still there" if path.exists() else ""
            raise CheckpointError(f"cannot write checkpoint {path}: {error}{kept}.") from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint with its tensors on the CPU, after checking that the file is whole.

    Raises:
        CheckpointError: the file is missing, truncated, damaged (checksums of its records), or holds anything
            but tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist.")
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for unreadable files
        raise CheckpointError(
            f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged: {error}. Nothing was "
            "loaded. Resume from another one with resume=PATH, such as best.ckpt beside it, or start anew "
            "without resume."
        ) from error
    return checkpoint


def check_same_config(path: Path, checkpoint: dict[str, Any], config: TrainConfig) -> None:
    """Raises unless the run that wrote the checkpoint computes what ``config`` does, naming the fields that
    differ.

    Both configs are resolved ones (:func:`flash_attn_train.device.resolve`).

    Raises:
        CheckpointError: a field differs, or the file is not a checkpoint of this package.
    """
    if "config" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path} has no config in it; expected one that flash-attn-train wrote."
        )
    saved, now = checkpoint["config"], flatten(config)
    differing = [
        f"{key} (checkpoint: {saved.get(key)!r}, now: {now.get(key)!r})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} is of another config: {'; '.join(differing)}. Give the checkpoint's values "
            "to continue it, or leave resume out to start a new run."
        )
    if checkpoint["global_step"] > config.trainer.max_steps:
        raise CheckpointError(
            f"checkpoint {path} is at step {checkpoint['global_step']}, expected at most trainer.max_steps="
            f"{config.trainer.max_steps}. Raise trainer.max_steps."
        )


def check_same_data(path: Path, checkpoint: dict[str, Any], config: TrainConfig, data_key: str) -> None:
    """Raises unless the checkpoint was trained on the same tokens.

    Raises:
        CheckpointError: corpus, split or tokenizer differ.
    """
    if checkpoint["data_key"] != data_key:
        saved = checkpoint["config"]
        fields = ("data.path", "data.suffixes", "data.val_fraction")
        was = ", ".join(f"{key}={saved.get(key)!r}" for key in fields)
        now = ", ".join(f"{key}={flatten(config)[key]!r}" for key in fields)
        raise CheckpointError(
            f"checkpoint {path} is of other training text: it was {was}; now it is {now}, with different "
            "content or split. Give the same text to continue it, or leave resume out to start a new run."
        )
