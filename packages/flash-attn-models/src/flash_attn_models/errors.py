"""One wording for every rejected argument, and the closest valid name for a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_MAX_NAMES_IN_MESSAGE = 8


def bad_argument(name: str, got: object, expected: str, fix: str) -> ValueError:
    """A ``ValueError`` that names the argument, what was given, what is accepted, and the way out."""
    return ValueError(f"{name}: got {got}; expected {expected}. Fix: {fix}.")


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like ``name``, or None if nothing resembles it."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or an empty string if nothing resembles ``name``."""
    match = closest(name, valid)
    return f" (did you mean {match!r}?)" if match else ""


def listed(names: Sequence[str], candidates: Iterable[str] = ()) -> str:
    """The first names, each with the closest candidate, and how many more there are."""
    candidates = list(candidates)
    shown = [name + did_you_mean(name, candidates) for name in names[:_MAX_NAMES_IN_MESSAGE]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
