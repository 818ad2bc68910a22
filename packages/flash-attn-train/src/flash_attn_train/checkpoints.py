"""Reading and writing checkpoints, and whether a checkpoint belongs to a config.

A checkpoint is a file, or a folder into which every rank wrote its part
(:mod:`flash_attn_train.distributed.checkpoint_folder`). Either is read as the same thing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import CheckpointIO
from torch import Tensor

from flash_attn_train.atomic import atomic_write, remove_leftovers, remove_path
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.checks import flatten, options
from flash_attn_train.distributed import checkpoint_folder as folders
from flash_attn_train.errors import CheckpointError

# Keys that do not change what is computed from the checkpoint on, or (the last ones) whose effect on it is
# checked otherwise: the corpus and a tokenizer's file by their content, the length of the schedule by
# scheduler.decay_steps, what makes up a batch by its size on all devices together.
_MAY_DIFFER = (
    "output_dir",
    "resume",
    "callbacks",
    "logger",
    "metrics",
    "checkpoint",
    "generation.",
    "strategy",
    "model.warm_start",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.nan",
    "trainer.profiler",
    "trainer.val_every_n_steps",
    "trainer.val_sequences",
    "data.cache_dir",
    "data.num_workers",
    "data.",
    "tokenizer.path",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.global_batch_size",
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
            if (
                path.is_dir() and not path.is_symlink()
            ):  # a folder that was copied here; a file replaces links only
                remove_path(path)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
            remove_leftovers(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            kept = "; the one before is still there" if path.exists() else ""
            raise CheckpointError(f"cannot write checkpoint {path}: {error}{kept}.") from error

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        remove_path(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint, file or folder, with its tensors on the CPU, after checking that it is undamaged.

    Of a folder this is what a single process would have written. Neither the ranks that wrote it nor a GPU are needed.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, damaged (checksums of its records), or holds anything
            but tensors and plain values.
    """
    try:
        return folders.read_checkpoint_folder(path) if _is_folder(path) else _read_file(path)
    except Exception as error:  # torch raises many types for unreadable files
        raise _damaged(path, error) from error


def map_checkpoint(path: Path) -> dict[str, Any]:
    """As :func:`read_checkpoint`, without checksums and optimizer state, and without reading the weights: those of a
    file are read where and when they are used; those of a folder have shapes alone (device "meta")."""
    try:
        if _is_folder(path):
            rest, stored = _rest_of_folder(path), folders.entries(path)
            shapes = {name: stored.get(f"model/{name}") for name in rest["names"]}
            weights = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in shapes.items()
                if entry is not None
            }
            return {**_without_bulk(rest), "state_dict": weights}
        return _load(path, mmap=True)
    except Exception as error:
        raise _damaged(path, error) from error


def read_header(path: Path) -> dict[str, Any]:
    """What a checkpoint has besides weights and optimizer state: config, step, ... Checks that it is complete, but not
    the checksums of what it does not read.

    Raises:
        CheckpointError: as :func:`read_checkpoint` does.
    """
    try:
        if _is_folder(path):
            header = _rest_of_folder(path)
        else:
            header = _load(path, mmap=True)
    except Exception as error:
        raise _damaged(path, error) from error
    return _without_bulk(header)


def _rest_of_folder(path: Path) -> dict[str, Any]:
    if not (path / folders.MANIFEST).is_file():
        raise ValueError(f"{folders.MANIFEST} is missing")
    return folders.read_rest(path)


def _without_bulk(checkpoint: dict[str, Any]) -> dict[str, Any]:
    bulk = ("state_dict", "optimizer_states", "names", "groups", "others")
    return {name: value for name, value in checkpoint.items() if name not in bulk}


def consolidate(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, file or folder, whole and on the CPU, under the names of the training module.

    Raises:
        CheckpointError: as :func:`read_checkpoint` does.
    """
    return read_checkpoint(path)["state_dict"]


def _is_folder(path: Path) -> bool:
    if path.is_dir():
        return True
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist.")
    return False


def _read_file(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as records:
        damaged = records.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
    return _load(path)


def _load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"checkpoint {path}: got a file with a {type(checkpoint).__name__}, expected one that flash-attn-train "
            "wrote."
        )
    return checkpoint


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    size = f"{path.stat().st_size} bytes" if path.is_file() else "a folder"
    return CheckpointError(
        f"checkpoint {path} ({size}) is truncated or damaged: {error}. Nothing was loaded. Resume from another "
        "one with resume=PATH, such as best.ckpt beside it, or start anew without resume."
    )


def check_has_config(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Raises :class:`CheckpointError` unless it is a checkpoint of a run of this package."""
    if "config" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path} has no config in it; expected one that flash-attn-train wrote."
        )


def check_same_config(path: Path, checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises unless the run that wrote the checkpoint computes what ``config`` does, naming the fields that
    differ. Devices and strategy may differ, if all devices together still have as many samples per step.

    Both configs are resolved ones (:func:`flash_attn_train.device.resolve`).

    Raises:
        CheckpointError: a field differs, or the file is not a checkpoint of this package.
    """
    check_has_config(path, checkpoint)
    # An option that is newer than the checkpoint was at its default, whatever that was called then.
    saved = {**{option.key: option.default for option in options(config)}, **checkpoint["config"]}
    now = flatten(config)
    differing = [
        f"{key} (checkpoint: {saved.get(key)!r}, now: {now.get(key)!r})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    if None in (saved["tokenizer.name"], now["tokenizer.name"]) and now["tokenizer.path"] is not None:
        # The same tokenizer, by its file: what it is decides about the data, and these are compared.
        differing = [text for text in differing if not text.startswith("tokenizer.")]
    before, after = _samples_per_step(checkpoint["config"]), _samples_per_step(now)
    if before != after:
        fields = [
            f"trainer.{name}" for name in ("batch_size", "accumulate_grad_batches", "devices", "num_nodes")
        ]
        changed = "; ".join(
            f"{key} (checkpoint: {saved.get(key)!r}, now: {now.get(key)!r})"
            for key in fields
            if saved.get(key) != now.get(key)
        )
        differing.append(f"samples per step (checkpoint: {before}, now: {after}) by {changed or 'strategy'}")
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


def _samples_per_step(config: dict[str, Any]) -> int:
    """On all devices together, of a flat config."""
    if config.get("trainer.global_batch_size"):
        return config["trainer.global_batch_size"]
    devices = config.get("trainer.devices", 1) * config.get("trainer.num_nodes", 1)
    ranks = devices // config.get("strategy.tensor_parallel_size", 1)
    return config["trainer.batch_size"] * config["trainer.accumulate_grad_batches"] * ranks


def check_same_data(path: Path, checkpoint: Mapping[str, Any], config: TrainConfig, data_key: str) -> None:
    """Raises unless the checkpoint was trained on the same data.

    Raises:
        CheckpointError: text, split or tokenizer differ; or images, or how they are augmented.
    """
    if checkpoint["data_key"] != data_key:
        saved, now = checkpoint["config"], flatten(config)
        kept = ("data.cache_dir", "data.num_workers")
        fields = [
            key
            for key in sorted(saved.keys() | now.keys())
            if key.startswith(("data", "tokenizer.")) and key not in kept and saved.get(key) != now.get(key)
        ]
        was, is_now = (
            ", ".join(f"{key}={values[key]!r}" for key in fields if key in values) or "under the same options"
            for values in (saved, now)
        )
        raise CheckpointError(
            f"checkpoint {path} is of other training data: it was {was}; now it is {is_now}, with different "
            "content or split. Give the same data to continue it, or leave resume out to start a new run."
        )
