"""Documents -> token ids, on all cores.

The tokenizers library encodes a batch of texts in threads of its own and lets go of Python's lock, so one process
uses all cores, while its own thread reads the next texts and converts and writes the ones before. Processes would gain
nothing and would have to pass the tokens between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flash_attn_train.data.tokenizer import encode_texts, pieces

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Texts are encoded together in groups of about this many characters.
GROUP_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class EncodedGroup:
    """Consecutive documents as tokens.

    Attributes:
        tokens: (n,) int64; each document is followed by the end-of-text token. A group can begin and end inside a
            document.
        ends: places in ``tokens`` after each end-of-text token, (documents that end here,) int64.
    """

    tokens: np.ndarray
    ends: np.ndarray


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], end_of_text: int, *, group_characters: int = GROUP_CHARACTERS
) -> Iterator[EncodedGroup]:
    """Encodes documents in order; the result does not depend on the number of cores."""

    def encode(group: list[tuple[str, bool]]) -> list[Encoding]:
        return encode_texts(tokenizer, [piece for piece, _ in group])

    with ThreadPoolExecutor(1) as pool:
        pending: tuple[list[tuple[str, bool]], Future[list[Encoding]]] | None = None
        for group in _grouped(texts, group_characters):  # read while the one before is encoded
            done = (pending[0], pending[1].result()) if pending else None
            pending = group, pool.submit(encode, group)
            if done is not None:
                yield _collect(*done, end_of_text)  # converted and written while this one is encoded
        if pending is not None:
            yield _collect(pending[0], pending[1].result(), end_of_text)


def _collect(group: list[tuple[str, bool]], encodings: list[Encoding], end_of_text: int) -> EncodedGroup:
    parts, ends, count = [], [], 0
    for encoding, (_, is_last) in zip(encodings, group, strict=True):
        ids = encoding.ids
        if is_last:
            ids.append(end_of_text)
        parts.append(np.array(ids, np.int64))
        count += len(ids)
        if is_last:
            ends.append(count)
    return EncodedGroup(np.concatenate(parts), np.array(ends, np.int64))


def _grouped(texts: Iterable[str], group_characters: int) -> Iterator[list[tuple[str, bool]]]:
    """Groups of (piece of text, whether it ends its document)."""
    group: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        parts = list(pieces(text))
        for number, part in enumerate(parts, start=1):
            group.append((part, number == len(parts)))
            characters += len(part)
            if characters >= group_characters:
                yield group
                group, characters = [], 0
    if group:
        yield group
