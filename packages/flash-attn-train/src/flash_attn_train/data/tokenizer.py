"""Byte-level BPE (Sennrich et al., 2016; on bytes as in GPT-2), trained with the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flash_attn_train.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

# Texts longer than this are tokenised in pieces, cut at line ends, to bound memory.
_PIECE_CHARACTERS = 1 << 20


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int, show_progress: bool
) -> Tokenizer:
    """Trains a byte-level BPE with the end-of-text token as id 0. Every text can be encoded and decodes to
    itself.

    The vocabulary is smaller than ``vocab_size`` where the text has not enough pairs seen ``min_frequency``
    times.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return _special_tokens_by_id_only(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer written by ``Tokenizer.save``.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a readable tokenizer file: {error}.") from error
    return _special_tokens_by_id_only(tokenizer)


def _special_tokens_by_id_only(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells a special token is encoded as text; the setting is not part of the saved file."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise DataError(
            f"the tokenizer has no token {END_OF_TEXT!r}; expected one that flash-attn-train made."
        )
    return token


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most about a million characters, cut after a line end where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
