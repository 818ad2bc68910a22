"""Which token of a vocabulary has which part to play."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flash_attn_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

# What tokenizers trained here for bidirectional models have besides END_OF_TEXT.
ENCODER_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")

# Spellings by part, the usual one first.
_SPELLINGS = {
    "end_of_text": (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"),
    "pad": ("[PAD]", "<pad>"),
    "begin": ("[CLS]", "<s>"),
    "separator": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids; None for those that the vocabulary lacks.

    Attributes:
        end_of_text: ends a document.
        pad: fills a batch.
        begin: first token of a sequence of a bidirectional model.
        separator: its last token.
        mask: stands for a hidden token.
        all: ids of every special token, these and others.
    """

    end_of_text: int
    pad: int | None
    begin: int | None
    separator: int | None
    mask: int | None
    all: tuple[int, ...]


def special_tokens(tokenizer: Tokenizer, *, end_of_text: str | None = None) -> SpecialTokens:
    """Finds the special tokens by their usual spellings.

    Args:
        end_of_text: the token that ends a document, where it is none of the usual ones.

    Raises:
        ConfigError: ``end_of_text`` is not in the vocabulary.
        DataError: no token that could end a document is.
    """
    found = {part: _first_id(tokenizer, names) for part, names in _SPELLINGS.items()}
    if end_of_text is not None:
        found["end_of_text"] = tokenizer.token_to_id(end_of_text)
        if found["end_of_text"] is None:
            raise ConfigError(
                f"tokenizer.end_of_text: got {end_of_text!r}, which is not in the vocabulary of the tokenizer; "
                "expected one of its tokens."
            )
    end = found.pop("end_of_text")
    if end is None:
        usual = ", ".join(_SPELLINGS["end_of_text"])
        raise DataError(
            f"the tokenizer has none of the usual tokens for the end of a document ({usual}). Name it with "
            "tokenizer.end_of_text=TOKEN."
        )
    added = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added |= {id for id in (end, *found.values()) if id is not None}
    return SpecialTokens(end, **found, all=tuple(sorted(added)))


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: more than the number of tokens where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def encoder_tokens(special: SpecialTokens, *, with_mask: bool) -> tuple[int, int, int, int]:
    """(pad, begin, separator, mask); mask is -1 without ``with_mask`` where there is none.

    Raises:
        DataError: the vocabulary lacks one, so that it does not fit a bidirectional model.
    """
    parts = {"pad": special.pad, "begin": special.begin, "separator": special.separator}
    if with_mask:
        parts["mask"] = special.mask
    missing = [" or ".join(_SPELLINGS[part]) for part, id in parts.items() if id is None]
    if missing:
        raise DataError(
            f"the tokenizer has no token {'; '.join(missing)}, which this task needs. Take a tokenizer of a "
            "bidirectional model, such as tokenizer.name=bert-base-uncased, or train one here."
        )
    pad, begin, separator = special.pad, special.begin, special.separator
    assert pad is not None and begin is not None and separator is not None
    return pad, begin, separator, -1 if special.mask is None else special.mask


def _first_id(tokenizer: Tokenizer, names: tuple[str, ...]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((id for id in ids if id is not None), None)
