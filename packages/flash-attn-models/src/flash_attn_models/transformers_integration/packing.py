"""Which tokens of a padded or packed batch belong to which sequence, found once per mask and not in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch.

    Attributes:
        indices: int64 (T,), into the flattened batch.
        cu_seqlens: int32 (B + 1,).
        contiguous: no row has padding between real tokens.
    """

    indices: Tensor
    cu_seqlens: Tensor
    contiguous: bool


def real_tokens(mask: Tensor, last: int | None = None) -> Tokens:
    """The tokens of a bool (B, T); of its ``last`` columns alone, if given."""

    def find() -> Tokens:
        part = mask if last is None else mask[:, mask.shape[1] - last :]
        begins = part & ~functional.pad(part, (1, 0))[:, :-1]
        return Tokens(
            part.flatten().nonzero().flatten(),
            functional.pad(part.sum(1).cumsum(0, dtype=torch.int32), (1, 0)),
            bool((begins.sum(1) <= 1).all()),
        )

    return _remembered(mask, f"tokens {last}", find)


def packed_cu_seqlens(segments: Tensor) -> Tensor:
    """int32 (sequences + 1,): where the sequences of an int (B, S) begin in the flattened batch, and its end."""

    return _remembered(segments, "segments", lambda: _bounds(segments[:, 1:] != segments[:, :-1]))


def bounds_of_restarts(positions: Tensor) -> Tensor:
    """int32 (sequences + 1,): the same by positions, int (B, S), which grow within a sequence."""

    def find() -> Tensor:
        return _bounds(positions[:, 1:] <= positions[:, :-1])

    # They are the caller's, and may be written anew, which in inference mode nothing tells of.
    return find() if positions.is_inference() else _remembered(positions, "restarts", find)


def _bounds(begins_after_first: Tensor) -> Tensor:
    begins = functional.pad(begins_after_first, (1, 0), value=True)
    starts = begins.flatten().nonzero().flatten()
    return functional.pad(starts, (0, 1), value=begins.numel()).int()


# Each is found by waiting for the device, and all layers are given the same tensor: by tensor, which version of it
# was looked at, and what was found in that.
_MEMORY = WeakIdKeyDictionary()


def _remembered(tensor: Tensor, what: str, find: Callable[[], T]) -> T:
    version = 0 if tensor.is_inference() else tensor._version
    known_version, found = _MEMORY.get(tensor, (None, {}))
    if known_version != version:
        found = {}
        _MEMORY[tensor] = (version, found)
    if what not in found:
        found[what] = find()
    result: T = found[what]
    return result
