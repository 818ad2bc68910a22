"""Text of a Hugging Face dataset, downloaded (or in a folder) or streamed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from flash_attn_train.configs.data import HubTextDataConfig
from flash_attn_train.data.extras import require
from flash_attn_train.data.prepare import cache_folder
from flash_attn_train.data.source import checked_text, is_held_out
from flash_attn_train.errors import ConfigError, DataError

_READ_ROWS = 1000
# " = Title = ", but not the headings inside an article, " = = Section = = ".
_TITLE = re.compile(r" = [^=](?:.*[^=])? = \n?")


class HubCorpus:
    """A dataset of the ``datasets`` library as documents. It is loaded (and downloaded) when documents are first read:
    what is prepared needs neither network nor the library.

    With ``data.val_split`` the splits are the dataset's own; else documents of ``data.split`` are held out by the
    hash of their text.

    Raises:
        ConfigError: data.name is not set.
    """

    prompt = ""

    def __init__(self, config: HubTextDataConfig) -> None:
        if not config.name:
            raise ConfigError(
                "data.name: got '', expected a dataset on the hub (OWNER/NAME) or a folder with one."
            )
        self.config = config
        self.title = "/".join(part for part in (config.name, config.config_name) if part)

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Split -> the library's Dataset.

        Raises:
            DataError: the library is not installed, or the dataset cannot be found or read.
        """
        config = self.config
        names = {"train": config.split, "validation": config.val_split or config.split}
        loaded = {name: load_split(config, name, streaming=False) for name in dict.fromkeys(names.values())}
        return {split: loaded[name] for split, name in names.items()}

    def fingerprint(self) -> str:
        """SHA-256 of the dataset's name and revision, and of what makes documents and splits of it; for a folder, also
        of its files' names, lengths and modification times, as they are when it is first asked for. Without
        data.revision, what is newest on the hub when a dataset is prepared stays until it is prepared anew."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # Once: what reads a dataset may write beside it.
        config = self.config
        parts: list[object] = [
            config.name,
            config.config_name,
            config.revision,
            config.split,
            config.val_split,
        ]
        parts += [config.text_field, config.rows, None if config.val_split else config.val_fraction]
        folder, cache = Path(config.name).expanduser().resolve(), cache_folder(config.cache_dir).resolve()
        for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not is_hidden and cache not in file.parents:
                status = file.stat()
                parts.append((file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def texts(self, split: str) -> Iterator[str]:
        field, dataset = self.config.text_field, self.splits[split]
        rows = (
            checked_text(value, field, self.title)
            for batch in dataset.select_columns([field]).iter(_READ_ROWS)
            for value in batch[field]
            if value is not None
        )
        for text in documents(rows, self.config.rows):
            if self.config.val_split or is_held_out(text, self.config.val_fraction) == (
                split == "validation"
            ):
                yield text

    def num_texts(self, split: str) -> int | None:
        if self.config.rows == "lines":
            return None
        held_out = self.config.val_fraction
        share = 1.0 if self.config.val_split else held_out if split == "validation" else 1 - held_out
        return round(share * len(self.splits[split]))

    def notes(self) -> str:
        return f"revision {self.config.revision}" if self.config.revision else ""


def documents(rows: Iterable[str], kind: str) -> Iterator[str]:
    """Documents of rows: the rows themselves, or for ``lines`` what is between two titles, title included. Blank
    documents are passed over."""
    if kind == "documents":
        yield from (row for row in rows if row.strip())
        return
    lines: list[str] = []
    for line in rows:
        if _TITLE.fullmatch(line) and lines:
            if any(map(str.strip, lines)):
                yield "".join(lines)
            lines = []
        lines.append(line if line.endswith("\n") else line + "\n")
    if any(map(str.strip, lines)):
        yield "".join(lines)


def load_split(config: HubTextDataConfig, split: str, *, streaming: bool) -> Any:
    """A split as the library's Dataset or IterableDataset, checked to have the text field.

    Raises:
        DataError: it cannot be found or read.
    """
    datasets = require("datasets", "data", "reads Hugging Face datasets")
    folder = Path(config.name).expanduser()
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:  # written by save_to_disk, which load_dataset does not read
            loaded = datasets.load_from_disk(folder)
            dataset = loaded[split] if isinstance(loaded, dict) else loaded
            dataset = dataset.to_iterable_dataset() if streaming else dataset
        else:
            dataset = datasets.load_dataset(
                str(folder) if folder.is_dir() else config.name,
                config.config_name,
                split=split,
                revision=None if folder.is_dir() else config.revision,
                streaming=streaming,
            )
        names = dataset.column_names or list(next(iter(dataset)))
    except Exception as error:  # the library and the hub raise many types
        first_line = str(error).strip().split("\n")[0]
        raise DataError(
            f"data.name: cannot load split {split!r} of {config.name!r} ({type(error).__name__}: {first_line}). "
            "Expected a dataset that the datasets library can load. Check data.name, data.config_name, data.split "
            "and the network; without a network, a folder with a copy of the dataset is taken."
        ) from error
    if config.text_field not in names:
        raise DataError(
            f"data.text_field: {config.name!r} has no field {config.text_field!r}; it has {', '.join(names)}. Set "
            "data.text_field to one of these."
        )
    return dataset
