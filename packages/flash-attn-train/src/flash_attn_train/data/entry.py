"""One entry of the cache: a folder with the tokenizer, the token files of both splits, and facts about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flash_attn_train.atomic import atomic_write
from flash_attn_train.data.token_file import corrupt, read_header
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.data.verified import open_verified, open_verified_anew

TOKENIZER = "tokenizer.json"
ENTRY = "entry.json"

# Of entry.json itself; entries of earlier versions have none.
_CHECKSUM = "facts_sha256"


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of a split.

    Attributes:
        tokens: the documents one after the other, each followed by the end-of-text token.
        starts: where each document starts and, last, where the last one ends, (documents + 1,) uint64.
        num_bytes: length of the text in UTF-8, as the source has it.
    """

    tokens: Tokens
    starts: np.ndarray
    num_bytes: int

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1


def split_facts(folder: Path, shards: list[str], offsets: str, num_bytes: int) -> dict[str, Any]:
    """What entry.json says of a split whose files are written."""
    names = [*shards, offsets]
    return {
        "shards": shards,
        "offsets": offsets,
        "bytes": num_bytes,
        "sha256": {name: read_header(folder / name).sha256 for name in names},
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes entry.json: the facts, and their checksum."""
    with atomic_write(folder / ENTRY) as file:
        file.write(json.dumps({**facts, _CHECKSUM: _sha256_of(facts)}, indent=2).encode())


def read_entry(entry: Path) -> dict[str, Any]:
    """The facts of an entry, after checking them and its tokenizer.

    Raises:
        DataError: the entry is damaged.
    """
    path = entry / ENTRY
    try:
        facts = json.loads(path.read_bytes())
        expected = facts["tokenizer_sha256"]
        tokenizer = (entry / TOKENIZER).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise corrupt(path, f"or {TOKENIZER} beside it cannot be read ({error})") from error
    if hashlib.sha256(tokenizer).hexdigest() != expected:
        raise corrupt(entry / TOKENIZER, "does not match its checksum")
    checksum = facts.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _sha256_of(facts):
        raise corrupt(path, "does not match its checksum")
    return facts


def _sha256_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def open_splits(
    entry: Path, facts: dict[str, Any], *, open_file: Callable[[Path], np.ndarray] = open_verified
) -> dict[str, SplitTokens]:
    """Opens the token files, each verified as :mod:`flash_attn_train.data.verified` says, or by ``open_file``.

    Raises:
        DataError: a file is missing, damaged, or not the one that was written with the entry.
    """
    splits = {}
    try:
        for split, fact in facts["splits"].items():
            arrays = {}
            for name, sha256 in fact["sha256"].items():
                if read_header(entry / name).sha256 != sha256:
                    raise corrupt(entry / name, f"does not match its checksum in {ENTRY}")
                arrays[name] = open_file(entry / name)
            tokens = Tokens([arrays[name] for name in fact["shards"]])
            splits[split] = SplitTokens(tokens, arrays[fact["offsets"]], fact["bytes"])
    except KeyError as error:  # of an earlier version's facts, which had no checksum
        raise corrupt(entry / ENTRY, f"does not have {error}") from error
    return splits


def content_key(facts: dict[str, Any]) -> str:
    """Hash of the tokens of both splits and of the tokenizer."""
    content = [facts["tokenizer_sha256"], *(fact["sha256"] for fact in facts["splits"].values())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def verify_entry(entry: Path) -> int:
    """Hashes every file of the entry again, whatever was found before. Returns the number of bytes read.

    Raises:
        DataError: a file is missing, damaged or changed.
    """
    facts = read_entry(entry)
    open_splits(entry, facts, open_file=open_verified_anew)
    names = [name for fact in facts["splits"].values() for name in fact["sha256"]]
    return sum((entry / name).stat().st_size for name in names)
