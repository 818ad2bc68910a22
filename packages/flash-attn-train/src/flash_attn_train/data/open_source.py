"""Config -> source of text."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

from flash_attn_train.configs.data import CorpusDataConfig, HubTextDataConfig, TextDataConfig
from flash_attn_train.data.corpus import files_under, read_corpus
from flash_attn_train.data.hub import HubCorpus
from flash_attn_train.data.record_corpus import RecordCorpus
from flash_attn_train.data.records import is_record_file
from flash_attn_train.data.source import TextSource
from flash_attn_train.errors import DataError


@singledispatch
def open_source(config: CorpusDataConfig) -> TextSource:
    """Finds the text that an entry of the data group names.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    raise TypeError(f"config: got {type(config).__name__}, expected a config of text.")


@open_source.register
def _(config: TextDataConfig) -> TextSource:
    root = None if config.path is None else Path(config.path).expanduser()
    records: list[Path] = []
    if root is not None and root.is_file():
        records = [root] if is_record_file(root) else []
    elif root is not None and root.is_dir():
        files = list(files_under(root, config.suffixes, set()))
        records = [file for file in files if is_record_file(file)]
        others = [file for file in files if not is_record_file(file)]
        if records and others:
            raise DataError(
                f"data.path: {root} has files of rows, e.g. {records[0].name}, and other files, e.g. "
                f"{others[0].name}; expected one kind. Set data.suffixes to the endings to read, e.g. "
                f"[{''.join(records[0].suffixes[-1:])}]."
            )
    if records:
        assert root is not None
        folder = root if root.is_dir() else root.parent
        return RecordCorpus(str(config.path), folder, tuple(records), config.text_field, config.val_fraction)
    return read_corpus(config.path, suffixes=config.suffixes, val_fraction=config.val_fraction)


@open_source.register
def _(config: HubTextDataConfig) -> TextSource:
    return HubCorpus(config)
