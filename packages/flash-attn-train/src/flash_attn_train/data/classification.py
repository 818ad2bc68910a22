"""Texts with a label each, for sequence classification."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flash_attn_train.configs.data import LabelledTextDataConfig
from flash_attn_train.data.batches import Batch
from flash_attn_train.data.masked_lm import pad_rows
from flash_attn_train.data.permutation import Order
from flash_attn_train.data.records import RECORD_SUFFIXES, is_record_file, read_records
from flash_attn_train.data.source import is_held_out
from flash_attn_train.data.special_tokens import SpecialTokens, encoder_tokens
from flash_attn_train.data.tokenizer import encode_texts
from flash_attn_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of a data set."""

    texts: list[str]
    labels: list[str]


def read_labelled(config: LabelledTextDataConfig) -> tuple[LabelledTexts, LabelledTexts]:
    """Training and validation rows: of two files, or of one from which rows are held out by the hash of their text.

    Raises:
        ConfigError: data.path is not set.
        DataError: a file cannot be read, or a split has no rows.
    """
    if not config.path:
        raise ConfigError(
            "data.path: got '', expected a JSONL, Parquet, CSV or TSV file of texts and labels."
        )
    rows = _read(config.path, "data.path", config)
    if config.val_path is not None:
        train, validation = rows, _read(config.val_path, "data.val_path", config)
    else:
        held_out = [is_held_out(text, config.val_fraction) for text, _ in rows]
        train = [row for row, out in zip(rows, held_out, strict=True) if not out]
        validation = [row for row, out in zip(rows, held_out, strict=True) if out]
    if not train or not validation:
        raise DataError(
            f"data.path: {config.path} has {len(rows)} rows, of which {len(train)} are to train on and "
            f"{len(validation)} to validate on; expected some of both. Use more rows, another data.val_fraction or a "
            "data.val_path."
        )
    splits = [LabelledTexts(*map(list, zip(*part, strict=True))) for part in (train, validation)]
    return splits[0], splits[1]


def _read(path: str, key: str, config: LabelledTextDataConfig) -> list[tuple[str, str]]:
    file = Path(path).expanduser()
    if not file.is_file() or not is_record_file(file):
        raise DataError(
            f"{key}: got {path!r}, expected a file whose name ends in {', '.join(RECORD_SUFFIXES)}."
        )
    rows = []
    for text, label in read_records(file, [config.text_field, config.label_field]):
        if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, (str, int)):
            raise DataError(
                f"{file}: got a row with {config.text_field}={text!r} and {config.label_field}={label!r}; expected a "
                "text, and a text or whole number as label."
            )
        rows.append((text, str(label)))
    return rows


def sorted_names(labels: Sequence[str]) -> list[str]:
    """The different labels, in the order of their class numbers: numerical if all are whole numbers, else that of
    their characters."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class LabelledTokens:
    """Rows as token ids, cut to ``length``, and class numbers, in memory.

    Raises:
        DataError: a label is not among ``names``.
    """

    def __init__(self, tokenizer: Tokenizer, rows: LabelledTexts, names: Sequence[str], length: int) -> None:
        unknown = sorted(set(rows.labels) - set(names))
        if unknown:
            raise DataError(
                f"data.val_path: label {unknown[0]!r} is not among those trained on ({', '.join(names)}); expected "
                "no others."
            )
        number = {name: place for place, name in enumerate(names)}
        self.labels = np.array([number[label] for label in rows.labels], np.int64)
        encodings = encode_texts(tokenizer, rows.texts)
        self.ids = [np.array(encoding.ids[:length], np.int32) for encoding in encodings]

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """SHA-256 of ids and labels."""
        digest = hashlib.sha256(self.labels.tobytes())
        for ids in self.ids:
            digest.update(b"\0" + ids.tobytes())
        return digest.hexdigest()


class ClassificationSamples:
    """``input_ids`` (n, S) int64, ``attention_mask`` (n, S) bool, False at padding, and ``labels`` (n,) int64.

    Args:
        rows: cut to seqlen - 2 tokens.
        order: sample number -> row.
        seqlen: S.
    """

    def __init__(
        self,
        rows: LabelledTokens,
        order: Order,
        special: SpecialTokens,
        *,
        seqlen: int,
    ) -> None:
        self.rows, self.order, self.seqlen = rows, order, seqlen
        self.pad, self.begin, self.separator, _ = encoder_tokens(special, with_mask=False)

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, numbers: np.ndarray) -> Batch:
        items = self.order(numbers)
        parts = [self.rows.ids[item] for item in items.tolist()]
        rows, attended = pad_rows(parts, self.seqlen, self.pad, self.begin, self.separator)
        return {
            "input_ids": torch.from_numpy(rows),
            "attention_mask": torch.from_numpy(attended),
            "labels": torch.from_numpy(self.rows.labels[items]),
        }
