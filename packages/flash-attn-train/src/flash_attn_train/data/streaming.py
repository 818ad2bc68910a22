"""Training on a Hugging Face dataset that is read from the network as it is needed, without a copy on disk.

The documents keep the order of the source; there is no shuffling (choose a source that is shuffled, as most web crawls
for pretraining are). Document number d of the training split goes to rank d modulo the number of ranks, and each rank
cuts the stream of its own documents into windows. So a rank's window number k is a pure function of (source, tokenizer,
context, number of ranks, rank, k): a run resumes by reading up to its window. What makes that fast are marks, in a
file of the cache: places in the source at which a run was before, with the tokens left over there. Without the file the
resumed run reads from the beginning, and sees the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset

from flash_attn_train.configs.data import HubTextDataConfig
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.task import LanguageModelConfig
from flash_attn_train.data.batches import Batch
from flash_attn_train.data.detokenizers import DETOKENIZERS
from flash_attn_train.data.encode import encode_documents
from flash_attn_train.data.hub import load_split
from flash_attn_train.data.language_model import LanguageModelSamples, language_model_batch
from flash_attn_train.data.module import DataFacts, DataModule, StreamSource
from flash_attn_train.data.prefetch import prefetch
from flash_attn_train.data.prepare import cache_folder, cached_tokenizer
from flash_attn_train.data.share import Share
from flash_attn_train.data.source import checked_text, is_held_out
from flash_attn_train.data.special_tokens import special_tokens, vocab_size_of
from flash_attn_train.data.stream_marks import Mark, StreamMarks
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.data.windows import ValidationWindows
from flash_attn_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Documents are read and tokenised in groups of about this many characters; marks are between groups.
_GROUP_CHARACTERS = 1 << 20


class StreamWindows:
    """A rank's windows of ``seqlen`` + 1 tokens, in order, from any number on.

    Args:
        open_dataset: makes the dataset, an IterableDataset of the ``datasets`` library.
        is_training: whether a document is of the training split.
        marks: where to remember places; None for nowhere.
    """

    def __init__(
        self,
        open_dataset: Callable[[], Any],
        *,
        text_field: str,
        is_training: Callable[[str], bool],
        detokenize: Callable[[str], str],
        tokenizer: Tokenizer,
        end_of_text: int,
        seqlen: int,
        rank: int = 0,
        world_size: int = 1,
        marks: StreamMarks | None = None,
        group_characters: int = _GROUP_CHARACTERS,
    ) -> None:
        self.open_dataset, self.text_field, self.is_training = open_dataset, text_field, is_training
        self.detokenize, self.tokenizer, self.end_of_text = detokenize, tokenizer, end_of_text
        self.seqlen, self.rank, self.world_size = seqlen, rank, world_size
        self.marks, self.group_characters = marks, group_characters

    def start_at(self, number: int) -> Iterator[np.ndarray]:
        """Windows ``number``, ``number`` + 1, ... without end, (seqlen + 1,) int64 each.

        Raises:
            DataError: the source has no documents for this rank, or cannot be read.
        """
        mark = (self.marks.before(number) if self.marks else None) or Mark(0, 0, None, [])
        count, left_over = mark.windows, np.array(mark.tokens, np.int64)
        for texts, documents, state in self._groups(mark):
            groups = list(encode_documents(self.tokenizer, map(self.detokenize, texts), self.end_of_text))
            tokens = np.concatenate([left_over, *(group.tokens for group in groups)])
            windows = max(0, len(tokens) - 1) // self.seqlen
            for place in range(windows):
                if count + place >= number:
                    yield tokens[place * self.seqlen : (place + 1) * self.seqlen + 1]
            count += windows
            left_over = tokens[windows * self.seqlen :]
            if self.marks:
                self.marks.add(Mark(count, documents, state, left_over.tolist()))

    def _groups(self, mark: Mark) -> Iterator[tuple[list[str], int, Any]]:
        """This rank's documents in groups, each with the number of training documents read so far, of all ranks, and
        the state of the dataset after it. Epoch after epoch."""
        documents, state = mark.documents, mark.state
        while True:
            before = documents
            dataset = self.open_dataset()
            if state is not None:
                dataset.load_state_dict(state)
            resumed, state = state is not None, None
            group: list[str] = []
            characters = taken = 0
            for text in _texts(dataset, self.text_field):
                if self.is_training(text):
                    if documents % self.world_size == self.rank:
                        group.append(text)
                        characters += len(text)
                        taken += 1
                    documents += 1
                if characters >= self.group_characters:
                    yield group, documents, dataset.state_dict()
                    group, characters = [], 0
            if group:
                yield group, documents, None  # the next epoch starts at the beginning
            if not taken and not resumed:
                raise DataError(
                    f"data.name: the source has {documents - before} documents to train on for {self.world_size} "
                    "data-parallel ranks; expected at least one for each. Use more data or fewer devices."
                )


def _texts(dataset: Any, text_field: str) -> Iterator[str]:
    """The text of each example; "" for those that have none."""
    examples = iter(dataset)
    while True:
        try:
            value = next(examples)[text_field]
        except StopIteration:
            return
        except Exception as error:  # of the network, the hub or the file format
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"data.name: cannot read on ({type(error).__name__}: {reason}). Start or resume the run when the "
                "source can be reached."
            ) from error
        yield "" if value is None else checked_text(value, text_field, "data.name")


class TextStream(StreamSource):
    """The windows of :class:`StreamWindows` as batches of each rank."""

    def __init__(
        self, windows: Callable[[Share], StreamWindows], *, end_of_text: int | None, ahead: int
    ) -> None:
        self.windows, self.end_of_text, self.ahead = windows, end_of_text, ahead

    def batches(self, share: Share) -> IterableDataset:
        return _StreamBatches(self, share)


class _StreamBatches(IterableDataset):
    def __init__(self, stream: TextStream, share: Share) -> None:
        self.stream, self.share = stream, share

    def __iter__(self) -> Iterator[Batch]:
        return prefetch(self._read(), self.stream.ahead) if self.stream.ahead else self._read()

    def _read(self) -> Iterator[Batch]:
        windows = self.stream.windows(self.share).start_at(self.share.first_sample // self.share.world_size)
        while True:
            rows = [next(windows) for _ in range(self.share.batch_size)]
            yield language_model_batch(np.stack(rows), self.stream.end_of_text)


def stream_data(data: HubTextDataConfig, config: TrainConfig) -> DataModule:
    """The data module of a streamed dataset, for a language model.

    Validation uses the first documents that are held out (or those of data.val_split), as many as
    trainer.val_sequences need; they are read before training starts.

    Raises:
        ConfigError: an option that does not go with streaming.
        DataError: the dataset cannot be read, or has too little held out.
    """
    assert isinstance(config.task, LanguageModelConfig)
    seqlen, sequences = getattr(config.model, "max_seqlen", 0), config.trainer.val_sequences
    if sequences is None or data.rows != "documents":
        key, got = ("trainer.val_sequences", "null") if sequences is None else ("data.rows", data.rows)
        raise ConfigError(
            f"{key}: got {got} with data.streaming=true, expected a number of sequences, and rows that are documents; "
            "or leave data.streaming out."
        )
    if not data.name:
        raise ConfigError(
            "data.name: got '', expected a dataset on the hub (OWNER/NAME) or a folder with one."
        )

    def is_training(text: str) -> bool:
        return bool(text.strip()) and (data.val_split is not None or not is_held_out(text, data.val_fraction))

    def open_train() -> Any:
        return load_split(data, data.split, streaming=True)

    def train_texts() -> Iterator[str]:
        return (detokenize(text) for text in _texts(open_train(), data.text_field) if is_training(text))

    detokenize = DETOKENIZERS[data.detokenizer]
    identity = [data.name, data.config_name, data.revision, data.split, data.val_split, data.val_fraction]
    identity += [data.text_field, data.detokenizer]
    folder = cache_folder(data.cache_dir) / "streams"
    trained = _hash([*identity, dataclasses.asdict(config.tokenizer)])
    tokenizer = cached_tokenizer(config.tokenizer, train_texts, folder / f"{trained}-tokenizer.json")
    special = special_tokens(tokenizer, end_of_text=config.tokenizer.end_of_text)
    tokens, num_bytes = _held_out_tokens(data, tokenizer, special.end_of_text, sequences * seqlen + 1)
    if len(tokens) <= seqlen:
        raise DataError(
            f"data.name: {data.name} has {len(tokens)} tokens held out, expected at least {seqlen + 1}: one context "
            "(model.max_seqlen) and its last target. Hold out more (data.val_fraction or data.val_split)."
        )
    key = _hash([*identity, tokenizer.to_str(), special.end_of_text, seqlen])

    def windows(share: Share) -> StreamWindows:
        return StreamWindows(
            open_train,
            text_field=data.text_field,
            is_training=is_training,
            detokenize=detokenize,
            tokenizer=tokenizer,
            end_of_text=special.end_of_text,
            seqlen=seqlen,
            rank=share.rank,
            world_size=share.world_size,
            marks=StreamMarks(_marks_file(folder, key, share)),
        )

    boundary = special.end_of_text if config.task.documents == "within" else None
    facts = DataFacts(
        key=key,
        lines={
            "corpus": f"{data.name}, streamed in its own order",
            "tokens": f"{len(tokens):,} held out, vocabulary of {vocab_size_of(tokenizer):,}",
        },
        tokenizer=tokenizer,
        end_of_text_id=special.end_of_text,
        vocab_size=vocab_size_of(tokenizer),
        val_bytes_per_token=num_bytes / len(tokens),
    )
    held_out = ValidationWindows(Tokens([tokens]), seqlen=seqlen, max_windows=sequences)
    return DataModule(
        TextStream(windows, end_of_text=boundary, ahead=4 * data.num_workers),
        LanguageModelSamples(held_out, end_of_text=boundary),
        facts,
        config,
    )


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _marks_file(folder: Path, key: str, share: Share) -> Path:
    return folder / f"{key}-rank{share.rank}of{share.world_size}.jsonl"


def _held_out_tokens(
    data: HubTextDataConfig, tokenizer: Tokenizer, end_of_text: int, enough: int
) -> tuple[np.ndarray, int]:
    """Tokens of the first held-out documents, at least ``enough`` where there are so many, and their UTF-8 bytes."""
    detokenize = DETOKENIZERS[data.detokenizer]
    parts: list[np.ndarray] = []
    num_bytes = count = 0
    for text in _texts(load_split(data, data.val_split or data.split, streaming=True), data.text_field):
        if not text.strip() or not (data.val_split or is_held_out(text, data.val_fraction)):
            continue
        num_bytes += len(text.encode())
        for group in encode_documents(tokenizer, [detokenize(text)], end_of_text):
            parts.append(group.tokens)
            count += len(group.tokens)
        if count >= enough:
            break
    return np.concatenate([np.empty(0, np.int64), *parts]), num_bytes
