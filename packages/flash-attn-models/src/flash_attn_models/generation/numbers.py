"""Numbers among the arguments of ``generate``: of the right kind, or refused by name."""

from __future__ import annotations

import operator
from typing import Any

from flash_attn_models.errors import bad_argument


def read_whole(name: str, value: Any, expected: str, fix: str) -> int:
    """An integer of whatever kind (Python's, NumPy's, a tensor of one) as Python's own; ValueError for all else, a bool
    among it."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise bad_argument(name, repr(value), f"{expected}, a whole number", fix)


def read_real(name: str, value: Any, expected: str, fix: str) -> float:
    """A number of whatever kind as a float; ValueError for all else."""
    if hasattr(value, "__float__") and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # an array of several
            pass
    raise bad_argument(name, repr(value), expected, fix)
