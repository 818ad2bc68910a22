"""One wording for every rejected argument."""

from __future__ import annotations


def bad_argument(name: str, got: object, expected: str, fix: str) -> ValueError:
    """A ``ValueError`` that names the argument, what was given, what is accepted, and the way out."""
    return ValueError(f"{name}: got {got}; expected {expected}. Fix: {fix}.")
