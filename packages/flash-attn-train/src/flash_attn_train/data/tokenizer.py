"""Tokenizers: a byte-level BPE (Sennrich et al., 2016; on bytes as in GPT-2) trained here, or a pretrained one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flash_attn_train.data.special_tokens import END_OF_TEXT
from flash_attn_train.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Texts longer than this are tokenised in pieces, cut at line ends, to bound memory.
_PIECE_CHARACTERS = 1 << 20


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int,
    show_progress: bool,
    special: tuple[str, ...] = (),
) -> Tokenizer:
    """Trains a byte-level BPE with the end-of-text token as id 0, followed by the tokens ``special``. Every text can
    be encoded and decodes to itself.

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
        special_tokens=[END_OF_TEXT, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return _text_as_text(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json of the ``tokenizers`` library, or of a folder that has one.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{file} is not a readable tokenizer file: {error}. Expected a tokenizer.json of the tokenizers library."
        ) from error
    return _text_as_text(tokenizer)


def pretrained_tokenizer(name: str) -> Tokenizer:
    """A tokenizer of the Hugging Face hub, or of its cache on this machine.

    Repositories with a tokenizer.json need the ``tokenizers`` library alone; for others ``transformers`` converts
    what they have.

    Raises:
        DataError: it cannot be found, or not without a network, or transformers cannot convert it.
    """
    from tokenizers import Tokenizer

    try:
        return _text_as_text(Tokenizer.from_pretrained(name))
    except Exception as first:  # bare Exception here too, and any of the hub's
        try:
            from transformers import AutoTokenizer

            return _text_as_text(
                Tokenizer.from_str(AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str())
            )
        except Exception:
            reason = str(first).strip().split("\n")[0]
            raise DataError(
                f"tokenizer.name: cannot load {name!r} ({reason}). Expected a name on the Hugging Face hub, such as "
                "gpt2, that can be reached or was downloaded before; without a network, set "
                "tokenizer.path=TOKENIZER_JSON, or set neither to train a tokenizer here."
            ) from first


def _text_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells a special token is encoded as text (a setting that is not part of the saved file), and whole:
    what some saved tokenizers have of truncation and padding is for other uses."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    """The texts alone, without the special tokens that a tokenizer puts around them.

    Raises:
        DataError: the tokenizer lacks a token for what is in a text, and one that stands for all such.
    """
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"tokenizer: got one that cannot encode the text ({error}), expected one that encodes any. Choose another "
            "tokenizer.name or tokenizer.path, or leave both out to train one."
        ) from error


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most about a million characters, cut after a line end where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
