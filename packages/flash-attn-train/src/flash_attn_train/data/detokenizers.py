"""Text as it was before the makers of a corpus split it into words: so that a tokenizer made for ordinary text, and
bits per byte, see ordinary text. Pure functions, text -> text."""

from __future__ import annotations

import re
from collections.abc import Callable

_CLOSING = re.compile(r" ([,.;:?!%)\]}])")
_OPENING = re.compile(r"([(\[{]) ")
_DOUBLE_QUOTED = re.compile(r'" (.*?) "')
_SINGLE_QUOTED = re.compile(r"(?<![^\s(])' ([^'\n]*?) '(?=[\s.,;:?!)]|$)")
_PLURAL_POSSESSIVE = re.compile(r"(\w) '(?=\s|$)")  # "the boys ' toys"
_CONTRACTION = re.compile(r" ('(?:s|S|re|ve|ll|d|m|t)\b|n't\b)")


def _keep(text: str) -> str:
    return text


def _join_punctuation(text: str) -> str:
    text = _CLOSING.sub(r"\1", text)
    return _OPENING.sub(r"\1", text)


def wikitext(text: str) -> str:
    """WikiText: ``@-@`` and its like are the bare characters, punctuation joins its word, headings keep their
    spaces."""
    for mark in ("-", ",", "."):
        text = text.replace(f" @{mark}@ ", mark)
    text = _DOUBLE_QUOTED.sub(r'"\1"', text)
    text = _SINGLE_QUOTED.sub(r"'\1'", text)
    text = _join_punctuation(text)
    text = _CONTRACTION.sub(r"\1", text)
    text = _PLURAL_POSSESSIVE.sub(r"\1'", text)
    # Degrees, feet and inches, and currency are written apart there.
    text = text.replace(" °", "°").replace("$ ", "$").replace("£ ", "£")
    return re.sub(r" +\n", "\n", text)


def ptb(text: str) -> str:
    """Penn Treebank: contractions and punctuation join their words; ``N`` and ``<unk>`` stay, what they stood for is
    lost."""
    text = _CONTRACTION.sub(r"\1", text)
    text = re.sub(r"\$ (?=N\b|\d)", "$", text)
    text = re.sub(r" (?=%)", "", text)
    text = _join_punctuation(text)
    return "\n".join(line.strip() for line in text.split("\n"))


def lm1b(text: str) -> str:
    """One Billion Word: contractions, possessives, punctuation and quotation marks join their words."""
    text = _CONTRACTION.sub(r"\1", text)
    text = _PLURAL_POSSESSIVE.sub(r"\1'", text)
    text = _DOUBLE_QUOTED.sub(r'"\1"', text)
    text = re.sub(r"(\d) , (?=\d{3}\b)", r"\1,", text)
    return re.sub(r"\$ (?=\d)", "$", _join_punctuation(text))


def lambada(text: str) -> str:
    """LAMBADA: typographic quotation marks become plain ones, and punctuation and contractions join their words."""
    for typographic, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("``", '"'), ("''", '"')):
        text = text.replace(typographic, plain)
    text = _DOUBLE_QUOTED.sub(r'"\1"', text)
    text = _CONTRACTION.sub(r"\1", text)
    return "\n" + _join_punctuation(text).strip()


# data.detokenizer -> function.
DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": _keep,
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
}
