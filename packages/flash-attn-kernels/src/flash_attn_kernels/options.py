"""What an attention call asks for besides its tensors, normalised once and shared by every path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import bad_argument


@dataclass(frozen=True)
class AttentionOptions:
    """Normalised options of one attention call.

    ``window_left`` and ``window_right`` are ``None`` where unbounded; causal attention is ``window_right == 0``.
    ``softcap`` is 0 when off. Key j is visible to query i iff
    ``i + shift - window_left <= j <= i + shift + window_right`` with ``shift = Sk - Sq`` (bottom-right alignment) or,
    with ``top_left``, 0.
    """

    softmax_scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    top_left: bool = False

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return self.window_left is None and self.window_right is None

    @property
    def is_plain_causal(self) -> bool:
        """The causal mask and nothing else."""
        return self.window_left is None and self.window_right == 0

    def diagonal_shift(self, seqlen_q: int, seqlen_k: int) -> int:
        """The key on whose diagonal query 0 lies: windows and ALiBi distances are measured from it."""
        return 0 if self.top_left else seqlen_k - seqlen_q

    def visible_keys(self, query_begin: int, query_end: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        """Half-open range of keys that at least one query of ``[query_begin, query_end)`` can see."""
        shift = self.diagonal_shift(seqlen_q, seqlen_k)
        begin = 0 if self.window_left is None else max(0, query_begin + shift - self.window_left)
        end = seqlen_k if self.window_right is None else min(seqlen_k, query_end + shift + self.window_right)
        begin = min(begin, seqlen_k)
        return begin, max(begin, end)


_FIXES = {
    "softmax_scale": "pass None for 1/sqrt(head_dim)",
    "softcap": "pass 0.0 to switch soft-capping off",
    "dropout_p": "pass 0.0 to switch dropout off",
}


def as_number(name: str, x: Any) -> float:
    """Of whatever Python, NumPy or torch calls a number.

    Raises:
        ValueError: for what is none.
    """
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError):
        raise bad_argument(name, repr(x), "a number", _FIXES[name]) from None


def as_window(window_size: Any) -> tuple[Any, ...]:
    """A tuple, which unlike a list can be hashed.

    Raises:
        ValueError: for what is no sequence.
    """
    try:
        return tuple(window_size)
    except TypeError:
        raise _bad_window(window_size) from None


def _is_window_side(x: Any) -> bool:
    try:
        return bool(int(x) == x and -1 <= x < 2**63)
    except (TypeError, ValueError, OverflowError):
        return False


def _bad_window(window_size: Any) -> ValueError:
    return bad_argument(
        "window_size", window_size, "(left, right) integers >= -1", "use -1 for an unbounded side"
    )


def make_options(
    *,
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    causal_alignment: str = "bottom-right",
) -> AttentionOptions:
    """Check and normalise the options of a public call.

    Raises:
        ValueError: for a dropout probability outside [0, 1), a window below -1, a negative or non-finite softcap,
            a non-finite scale, or an unknown alignment.
    """
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise bad_argument("softmax_scale", softmax_scale, "a finite number", _FIXES["softmax_scale"])
    if not 0.0 <= dropout_p < 1.0:
        raise bad_argument("dropout_p", dropout_p, "a probability in [0, 1)", _FIXES["dropout_p"])
    if not (math.isfinite(softcap) and softcap >= 0.0):
        raise bad_argument("softcap", softcap, "a finite number >= 0", _FIXES["softcap"])
    if len(window_size) != 2 or not all(map(_is_window_side, window_size)):
        raise _bad_window(window_size)
    if causal_alignment not in ("bottom-right", "top-left"):
        raise bad_argument(
            "causal_alignment", repr(causal_alignment), "'bottom-right' or 'top-left'", "pass one of the two"
        )
    left, right = (None if w == -1 else int(w) for w in window_size)
    if causal:
        right = 0
    return AttentionOptions(
        scale,
        left,
        right,
        float(softcap),
        float(dropout_p),
        bool(deterministic),
        causal_alignment == "top-left",
    )
