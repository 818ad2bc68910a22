"""Text -> tokenizer and token files, kept in a cache that is keyed by the text's identity and the settings."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash_attn_train.atomic import atomic_write, sync_folder
from flash_attn_train.configs.data import TokenizerConfig
from flash_attn_train.console import is_terminal, say, with_progress
from flash_attn_train.data.cache_lock import cache_lock
from flash_attn_train.data.detokenizers import DETOKENIZERS
from flash_attn_train.data.encode import encode_documents
from flash_attn_train.data.entry import (
    TOKENIZER,
    SplitTokens,
    content_key,
    open_splits,
    read_entry,
    split_facts,
    write_facts,
)
from flash_attn_train.data.source import SPLITS, TextSource
from flash_attn_train.data.special_tokens import (
    ENCODER_TOKENS,
    SpecialTokens,
    special_tokens,
    vocab_size_of,
)
from flash_attn_train.data.token_file import (
    FORMAT_VERSION,
    OFFSET_DTYPE,
    corrupt,
    token_dtype,
    write_token_file,
)
from flash_attn_train.data.tokenizer import load_tokenizer, pretrained_tokenizer, train_tokenizer
from flash_attn_train.data.tokens import Tokens, write_shards
from flash_attn_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class PreparedData:
    """What training needs of a corpus."""

    tokenizer: Tokenizer
    tokenizer_file: Path
    special: SpecialTokens
    splits: dict[str, SplitTokens]  # "train" and "validation"
    key: str  # hash of tokens and tokenizer: equal keys, equal tokens, whatever machine made them
    from_cache: bool

    @property
    def train(self) -> Tokens:
        return self.splits["train"].tokens

    @property
    def validation(self) -> Tokens:
        return self.splits["validation"].tokens

    @property
    def vocab_size(self) -> int:
        return vocab_size_of(self.tokenizer)


def default_cache_dir() -> Path:
    """``flash-attn-train`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash-attn-train"


def cache_folder(cache_dir: str | None) -> Path:
    """The cache folder that data.cache_dir means."""
    return Path(cache_dir).expanduser() if cache_dir else default_cache_dir()


def prepare_data(
    source: TextSource,
    tokenizer_config: TokenizerConfig,
    *,
    seqlen: int | None = None,
    cache_dir: str | None = None,
    detokenizer: str = "none",
    for_encoder: bool = False,
) -> PreparedData:
    """Trains the tokenizer on the training split, or fetches the pretrained one, and tokenises both splits; or opens
    the result of an earlier call.

    Each document is followed by the end-of-text token. The cache key is a hash of the source's fingerprint, the
    tokenizer settings (of a pretrained one: its content) and the detokeniser. An entry is built aside and renamed when
    it is complete, so an interrupted build leaves nothing behind that looks like an entry. One process builds;
    others that want the same entry wait for it.

    Args:
        seqlen: if given, both splits must have at least ``seqlen`` + 1 tokens.
        detokenizer: a name in :data:`flash_attn_train.data.detokenizers.DETOKENIZERS`.
        for_encoder: whether a tokenizer trained here has [CLS], [SEP], [MASK] and [PAD].

    Raises:
        ConfigError: both a name and a path of a tokenizer are given.
        DataError: the text cannot be read or changes meanwhile, the cache cannot be written, an entry is damaged, or
            a split is too short.
    """
    root = cache_folder(cache_dir)
    pretrained = _pretrained(tokenizer_config)
    if pretrained is not None:
        settings: dict[str, Any] = {"tokenizer": _sha256(pretrained.to_str())}
    else:
        settings = {
            name: getattr(tokenizer_config, name)
            for name in ("vocab_size", "min_frequency", "train_characters")
        }
        settings["for_encoder"] = for_encoder
    settings |= {
        "format": FORMAT_VERSION,
        "source": source.fingerprint(),
        "end_of_text": tokenizer_config.end_of_text,
        "detokenizer": detokenizer,
    }
    entry = root / _sha256(json.dumps(settings, sort_keys=True))[:16]
    from_cache = entry.is_dir()
    if not from_cache:
        _build_once(_Build(source, tokenizer_config, pretrained, detokenizer, for_encoder, settings), entry)
    facts = read_entry(entry)
    tokenizer = load_tokenizer(entry / TOKENIZER)
    splits = open_splits(entry, facts)
    _check_width(entry, facts, splits, vocab_size_of(tokenizer))
    data = PreparedData(
        tokenizer,
        entry / TOKENIZER,
        special_tokens(tokenizer, end_of_text=tokenizer_config.end_of_text),
        splits,
        content_key(facts),
        from_cache,
    )
    if seqlen is not None:
        check_length(data, source.title, seqlen)
    return data


def _check_width(entry: Path, facts: dict[str, Any], splits: dict[str, SplitTokens], vocab_size: int) -> None:
    # Earlier versions went by the number of tokens, and cut the ids of a vocabulary with gaps.
    for split, tokens in splits.items():
        width = tokens.tokens.dtype.itemsize
        if width < token_dtype(vocab_size).itemsize:
            raise corrupt(
                entry / facts["splits"][split]["shards"][0],
                f"has {width} bytes per token, too few for a vocabulary of {vocab_size:,}",
            )


def check_length(data: PreparedData, title: str, seqlen: int) -> None:
    """Raises :class:`DataError` unless each split has at least one context and its last target."""
    for split, tokens in (("train", data.train), ("validation", data.validation)):
        if len(tokens) <= seqlen:
            raise DataError(
                f"data.path: the {split} split of {title} has {len(tokens)} tokens, expected at least "
                f"{seqlen + 1}: one context (model.max_seqlen={seqlen}) and its last target. Use more text, "
                "a smaller model.max_seqlen or another data.val_fraction."
            )


def tokenizer_of(
    config: TokenizerConfig, texts: Callable[[], Iterator[str]], *, for_encoder: bool = False
) -> Tokenizer:
    """The pretrained tokenizer, or one trained on the first ``train_characters`` of the texts."""
    pretrained = _pretrained(config)
    if pretrained is not None:
        return pretrained
    say("training a tokenizer ...")

    def first_texts() -> Iterator[str]:
        characters = 0
        for text in texts():
            yield text
            characters += len(text)
            if characters >= config.train_characters:
                return

    return train_tokenizer(
        first_texts(),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        show_progress=is_terminal(),
        special=ENCODER_TOKENS if for_encoder else (),
    )


def cached_tokenizer(config: TokenizerConfig, texts: Callable[[], Iterator[str]], file: Path) -> Tokenizer:
    """As :func:`tokenizer_of`; one that is trained here is kept in the file, from which it is read later."""
    if config.name is not None or config.path is not None:
        return tokenizer_of(config, texts)
    with cache_lock(file.parent, file.name):
        if not file.is_file():
            trained = tokenizer_of(config, texts)
            try:
                with atomic_write(file) as writing:
                    writing.write(trained.to_str(pretty=True).encode())
            except OSError as error:
                if not _is_disk_full(error):
                    raise
                raise _disk_full(file.parent, error) from error
    return load_tokenizer(file)


def _pretrained(config: TokenizerConfig) -> Tokenizer | None:
    if config.name is not None and config.path is not None:
        raise ConfigError(
            f"tokenizer.name: got {config.name!r} together with tokenizer.path={config.path!r}; expected at most "
            "one of the two. Leave one out."
        )
    if config.path is not None:
        return load_tokenizer(Path(config.path).expanduser())
    return pretrained_tokenizer(config.name) if config.name is not None else None


@dataclass(frozen=True)
class _Build:
    """How an entry is built."""

    source: TextSource
    tokenizer_config: TokenizerConfig
    pretrained: Tokenizer | None
    detokenizer: str
    for_encoder: bool
    settings: dict[str, Any]


def _build_once(build: _Build, entry: Path) -> None:
    """Builds the entry, or waits while another process does."""
    with cache_lock(entry.parent, entry.name):
        if not entry.is_dir():
            # Of a build that was killed. Only this machine's: not all shared folders lock across machines.
            for left_over in entry.parent.glob(f"{_building_prefix(entry)}*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)
            _build(build, entry)


def _building_prefix(entry: Path) -> str:
    return f"{entry.name}.{socket.gethostname()}."


def _build(build: _Build, entry: Path) -> None:
    # Not by tempfile, whose folders nobody else may read.
    building = entry.with_name(f"{_building_prefix(entry)}{secrets.token_hex(4)}.tmp")
    try:
        building.mkdir()
        detokenize = DETOKENIZERS[build.detokenizer]
        tokenizer = build.pretrained or tokenizer_of(
            build.tokenizer_config,
            lambda: map(detokenize, build.source.texts("train")),
            for_encoder=build.for_encoder,
        )
        saved_tokenizer = tokenizer.to_str(pretty=True).encode()
        with atomic_write(building / TOKENIZER) as file:
            file.write(saved_tokenizer)
        facts = {
            "settings": build.settings,
            "tokenizer_sha256": _sha256(saved_tokenizer),
            "splits": {split: _write_split(build, tokenizer, building, split) for split in SPLITS},
        }
        _check_unchanged(build)
        write_facts(building, facts)
        try:
            building.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another machine, of a shared folder without locks, was first
                raise
        sync_folder(entry.parent)
    except OSError as error:
        if not _is_disk_full(error):
            raise
        raise _disk_full(entry.parent, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_unchanged(build: _Build) -> None:
    # Else these tokens would be taken for those of the text as it was before.
    if build.source.fingerprint() != build.settings["source"]:
        raise DataError(
            f"data.path: {build.source.title} has changed while it was read; expected that nothing writes to it. Start "
            "again when it is complete."
        )


def _write_split(build: _Build, tokenizer: Tokenizer, folder: Path, split: str) -> dict[str, Any]:
    end_of_text = special_tokens(tokenizer, end_of_text=build.tokenizer_config.end_of_text).end_of_text
    total = build.source.num_texts(split)
    detokenize = DETOKENIZERS[build.detokenizer]
    num_bytes = 0
    starts = [np.zeros(1, np.int64)]  # where the documents start, and where the last one ends
    num_tokens = 0

    def texts() -> Iterator[str]:
        nonlocal num_bytes
        # A total of 0 is an unknown one to the progress bar.
        for text in with_progress(
            build.source.texts(split), title=f"tokenising the {split} split", total=total or 0
        ):
            num_bytes += len(
                text.encode()
            )  # of the corpus, so that bits per byte do not depend on the detokeniser
            yield detokenize(text)

    def chunks() -> Iterator[np.ndarray]:
        nonlocal num_tokens
        for group in encode_documents(tokenizer, texts(), end_of_text):
            starts.append(num_tokens + group.ends)
            num_tokens += len(group.tokens)
            yield group.tokens

    dtype = token_dtype(vocab_size_of(tokenizer))
    try:
        shards = write_shards(folder, split, chunks(), dtype)
        offsets = f"{split}.documents.bin"
        write_token_file(folder / offsets, iter(starts), OFFSET_DTYPE)
    except OSError as error:
        if not _is_disk_full(error):
            raise
        done = sum(map(len, itertools.islice(starts, 1, None)))
        raise _disk_full(folder.parent, error, num_tokens * dtype.itemsize, done, total) from error
    return split_facts(folder, shards, offsets, num_bytes)


def _is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_full(
    folder: Path, error: OSError, written_bytes: int = 0, done: int = 0, total: int | None = None
) -> DataError:
    """The error for a full disk, after so many bytes of tokens of ``done`` of the ``total`` texts of a split."""
    needed = "more than that"
    if total and done:
        needed = f"about {max(written_bytes * total // done, written_bytes):,} bytes for this split"
    return DataError(
        f"data.cache_dir: the disk of {folder} is full ({error.strerror}) after {written_bytes:,} bytes of tokens; "
        f"expected room for {needed}. Nothing of it was kept. Free some, or set data.cache_dir to a folder on another "
        "disk."
    )


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
