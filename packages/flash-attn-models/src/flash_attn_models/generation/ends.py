"""When a sequence ends: at an id, or as soon as its text contains a string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.numbers import read_whole
from flash_attn_models.gpt.config import GPTConfig


class Tokenizer(Protocol):
    """What stop strings need of a tokenizer, as Hugging Face's have it."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of some ids."""


Decode = Callable[[list[int]], str]


class StopStrings:
    """Finds strings in what was generated. A row's text is decoded from its last tokens alone, as many as the longest
    string has bytes and a few more: each token stands for at least one byte.

    Args:
        strings: not empty.
        decode: the text of token ids.
    """

    def __init__(self, strings: tuple[str, ...], decode: Decode) -> None:
        self._strings = strings
        self._decode = decode
        # More than the bytes need: tokenizers drop a leading space, and what they skip stands for nothing.
        self._n_tokens = max(len(string.encode()) for string in strings) + 16

    def ends(self, text: list[int], token: int) -> bool:
        """Add a token to the ids of a row; whether its text now contains one of the strings."""
        text.append(token)
        del text[: -self._n_tokens]
        decoded = self._decode(text)
        return any(string in decoded for string in self._strings)


def read_eos_ids(config: GPTConfig, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The given ids, or the config's."""
    if eos_token_id is None:
        return config.eos_token_ids
    is_one = not isinstance(eos_token_id, Iterable) or isinstance(eos_token_id, str)
    is_one |= getattr(eos_token_id, "ndim", 1) == 0  # a tensor of one number
    ids: Iterable[Any] = (eos_token_id,) if is_one else eos_token_id  # type: ignore[assignment]
    return tuple(_read_token_id("eos_token_id", token, config) for token in ids)


def read_pad_id(config: GPTConfig, pad_token_id: int | None, eos_ids: tuple[int, ...]) -> int:
    """The given id, or the config's, or else the first one that ends a row, or else 0."""
    if pad_token_id is not None:
        return _read_token_id("pad_token_id", pad_token_id, config)
    if config.pad_token_id is not None:
        return config.pad_token_id
    return eos_ids[0] if eos_ids else 0


def read_stop_strings(
    stop_strings: str | Sequence[str] | None, tokenizer: Tokenizer | Decode | None
) -> StopStrings | None:
    """The two options of ``generate``, checked."""
    if stop_strings is None:
        if tokenizer is not None:
            raise bad_argument(
                "tokenizer",
                type(tokenizer).__name__,
                "to be left out without stop_strings, where it has no effect",
                "pass stop_strings, or decode the result",
            )
        return None
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise bad_argument(
            "stop_strings", strings, "one or more strings, none empty", "leave it out for none"
        )
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        raise bad_argument(
            "tokenizer",
            tokenizer,
            "an object with decode(ids) -> str, or such a function, with stop_strings",
            "pass the tokenizer that made input_ids",
        )
    return StopStrings(strings, decode)


def _read_token_id(name: str, token: int, config: GPTConfig) -> int:
    expected, fix = (
        f"a token id in [0, vocab_size={config.vocab_size})",
        "use the id that this model's tokenizer has",
    )
    token = read_whole(name, token, expected, fix)
    if not 0 <= token < config.vocab_size:
        raise bad_argument(name, token, expected, fix)
    return token
