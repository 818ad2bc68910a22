"""What every source of text offers: documents, split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

from flash_attn_train.errors import DataError

SPLITS = ("train", "validation")


class TextSource(Protocol):
    """Documents in a fixed order, of which none is in both splits."""

    @property
    def title(self) -> str:
        """What a person calls it."""
        ...

    @property
    def prompt(self) -> str:
        """A beginning that suits the text; "" for none."""
        ...

    def fingerprint(self) -> str:
        """Hash of what the documents are and of the split. Equal fingerprints, equal documents."""
        ...

    def texts(self, split: str) -> Iterator[str]:
        """The documents of "train" or "validation".

        Raises:
            DataError: the source cannot be read.
        """
        ...

    def num_texts(self, split: str) -> int | None:
        """How many there are, about; None if that is not known without reading all."""
        ...

    def notes(self) -> str:
        """What a person should know besides the sizes, such as files passed over; "" for nothing."""
        ...


def checked_text(value: Any, field: str, place: object) -> str:
    """The value of a text field.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        return value
    raise DataError(
        f"{place}: field {field!r} has a {type(value).__name__}, expected a text. Set data.text_field."
    )


def hash_fraction(name: str) -> float:
    """Where the SHA-256 of the text falls in the range of hashes, from 0 to 1."""
    # Names of files that are not UTF-8 have surrogates.
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone, so that copies are on one side and adding
    documents moves none across."""
    return hash_fraction(text) < val_fraction
