"""Text of record files on disk: each row is a document, held out by the hash of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_attn_train.data.records import count_records, read_records
from flash_attn_train.data.source import checked_text, is_held_out
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
        other times is tokenised again, to the same tokens.

        Raises:
            DataError: a file is not there.
        """
        digest = hashlib.sha256(f"{self.text_field}\0{self.val_fraction!r}\n".encode())
        for file in self.files:
            try:
                status = file.stat()
            except OSError as error:
                raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error
            name = file.relative_to(self.root).as_posix()
            facts = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(facts.encode("utf-8", "surrogatepass"))  # names need not be UTF-8
        return digest.hexdigest()

    def texts(self, split: str) -> Iterator[str]:
        for file in self.files:
            for (value,) in read_records(file, [self.text_field]):
                text = checked_text(value, self.text_field, file)
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
