"""Names of the classes, by class number: in the run folder for people, and in each checkpoint for those who get it
without the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from flash_attn_train.atomic import atomic_write
from flash_attn_train.errors import CheckpointError
from flash_attn_train.run_folder import RunFolder

_KEY = "label_names"  # in a checkpoint


class LabelNames(pl.Callback):
    """Puts the names into every checkpoint."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = self.names


def write_label_names(folder: RunFolder, names: Sequence[str]) -> None:
    with atomic_write(folder.labels) as file:
        file.write((json.dumps(list(names), ensure_ascii=False, indent=2) + "\n").encode())


def read_label_names(checkpoint: Mapping[str, Any], folder: RunFolder | None) -> list[str]:
    """The names; none where there are none.

    Args:
        checkpoint: of which the header will do.
        folder: of its run, which has the names of checkpoints that were written without; None if that is not known.

    Raises:
        CheckpointError: the folder's file cannot be read.
    """
    if _KEY in checkpoint:
        return list(checkpoint[_KEY])
    if folder is None or not folder.labels.is_file():
        return []
    try:
        names = json.loads(folder.labels.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder.labels} cannot be read: {error}. Remove it to go on without the classes' names."
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{folder.labels}: got {names!r:.80}, expected a list of the classes' names. Remove it to go on without "
            "them."
        )
    return names
