"""Corpus -> tokenizer and token files, kept in a cache that is keyed by the content of the corpus."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flash_attn_train.atomic import sync_folder
from flash_attn_train.configs import TokenizerConfig
from flash_attn_train.console import is_terminal, say, with_progress
from flash_attn_train.data.corpus import Corpus, Document
from flash_attn_train.data.token_file import FORMAT_VERSION, open_token_file, token_dtype, write_token_file
from flash_attn_train.data.tokenizer import end_of_text_id, load_tokenizer, pieces, train_tokenizer
from flash_attn_train.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKENIZER = "tokenizer.json"
_SPLITS = {"train": "train.bin", "validation": "validation.bin"}

# Texts are encoded together, in parallel, in groups of about this many characters.
_GROUP_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class PreparedData:
    """What training needs of a corpus."""

    tokenizer: Tokenizer
    tokenizer_file: Path
    train: np.ndarray  # (n,) uint16 or uint32, memory-mapped
    validation: np.ndarray  # the same
    key: str  # the cache key: equal keys, equal tokens
    from_cache: bool

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()


def default_cache_dir() -> Path:
    """``flash-attn-train`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash-attn-train"


def prepare_data(
    corpus: Corpus, tokenizer_config: TokenizerConfig, *, seqlen: int, cache_dir: str | None = None
) -> PreparedData:
    """Trains the tokenizer on the training split and tokenises both splits, or opens the result of an earlier
    call.

    Each document is followed by the end-of-text token. The cache key is a hash of the corpus (names,
    contents, split) and the tokenizer settings. An entry is built aside and renamed when it is complete, so
    an interrupted build leaves nothing behind that looks like an entry.

    Raises:
        DataError: the cache cannot be written, an entry is damaged, or a split is shorter than one context.
    """
    root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    settings = {
        "format": FORMAT_VERSION,
        "corpus": corpus.fingerprint(),
        "vocab_size": tokenizer_config.vocab_size,
        "min_frequency": tokenizer_config.min_frequency,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    entry = root / key
    from_cache = entry.is_dir()
    if not from_cache:
        _build(corpus, tokenizer_config, entry)
    tokens = {split: open_token_file(entry / name) for split, name in _SPLITS.items()}
    for split, array in tokens.items():
        if len(array) <= seqlen:
            raise DataError(
                f"data.path: the {split} split of {corpus.title} has {len(array)} tokens, expected at least "
                f"{seqlen + 1}: one context (model.max_seqlen={seqlen}) and its last target. Use more text "
                "or a smaller model.max_seqlen."
            )
    return PreparedData(
        load_tokenizer(entry / _TOKENIZER),
        entry / _TOKENIZER,
        tokens["train"],
        tokens["validation"],
        key,
        from_cache,
    )


def _build(corpus: Corpus, tokenizer_config: TokenizerConfig, entry: Path) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
    except OSError as error:
        raise DataError(
            f"data.cache_dir: cannot write to {entry.parent} ({error.strerror}); expected a writable folder. "
            "Set data.cache_dir to one."
        ) from error
    try:
        tokenizer = _train(corpus.train, tokenizer_config)
        tokenizer.save(str(building / _TOKENIZER))
        dtype = token_dtype(tokenizer.get_vocab_size())
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            write_token_file(building / _SPLITS[split], _encode(tokenizer, documents, split), dtype)
        try:
            building.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process has finished the same entry first
                raise
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _train(documents: tuple[Document, ...], config: TokenizerConfig) -> Tokenizer:
    say(f"training a tokenizer on {len(documents)} documents ...")
    texts = (document.text() for document in documents)
    return train_tokenizer(
        texts, vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=is_terminal()
    )


def _encode(tokenizer: Tokenizer, documents: tuple[Document, ...], split: str) -> Iterator[np.ndarray]:
    end_of_text = end_of_text_id(tokenizer)
    for group in _grouped(
        with_progress(documents, title=f"tokenising the {split} split", total=len(documents))
    ):
        for encoding, is_last in zip(
            tokenizer.encode_batch_fast([piece for piece, _ in group]),
            [last for _, last in group],
            strict=True,
        ):
            yield np.array(encoding.ids + [end_of_text] * is_last, np.int64)


def _grouped(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Groups of (piece of text, whether it ends its document)."""
    group: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        parts = list(pieces(document.text()))
        for number, part in enumerate(parts, start=1):
            group.append((part, number == len(parts)))
            characters += len(part)
            if characters >= _GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group
