"""Text of record files on disk: each row is a document, held out by the hash of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_attn_train.data.records import count_records, read_records
from flash_attn_train.data.source import is_held_out
from flash_attn_train.errors import DataError


@dataclass(frozen=True)
class RecordCorpus:
    """The field ``text_field`` of every row of ``files``, which lie under ``root``."""

    title: str
    root: Path
    files: tuple[Path, ...]
    text_field: str = "text"
    val_fraction: float = 0.05
    prompt: str = ""

    def fingerprint(self) -> str:
        """SHA-256 of names, lengths and modification times. Not of contents, which can be terabytes: a copy with
        other times is tokenised again, to the same tokens."""
        digest = hashlib.sha256(f"{self.text_field}\0{self.val_fraction!r}\n".encode())
        for file in self.files:
            status = file.stat()
            name = file.relative_to(self.root).as_posix()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def texts(self, split: str) -> Iterator[str]:
        for file in self.files:
            for (text,) in read_records(file, [self.text_field]):
                if not isinstance(text, str):
                    raise DataError(
                        f"{file}: field {self.text_field!r} has a {type(text).__name__}, expected a text. Set "
                        "data.text_field."
                    )
                if text.strip() and is_held_out(text, self.val_fraction) == (split == "validation"):
                    yield text

    def num_texts(self, split: str) -> int | None:
        counts = [count_records(file) for file in self.files]
        if None in counts:
            return None
        share = self.val_fraction if split == "validation" else 1 - self.val_fraction
        return round(share * sum(count for count in counts if count is not None))

    def notes(self) -> str:
        return f"{len(self.files)} files" if len(self.files) > 1 else ""
