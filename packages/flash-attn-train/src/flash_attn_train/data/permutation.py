"""Keyed pseudo-random functions on arrays of integers: an order that needs no table and no state."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np


@lru_cache(maxsize=256)
def derive_key(*parts: int) -> int:
    """A 64-bit key from whole numbers >= 0, such as (seed, epoch, purpose)."""
    return int(np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed pseudo-random permutation of range(size) takes each index; no table, so size has no
    limit.

    A balanced Feistel network on the smallest even number of bits that holds ``size``, applied again to
    results that are not below ``size`` (cycle walking; Black and Rogaway, 2002). The domain is under 4 size +
    4, so it takes about four applications at most on average.
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    result = np.array(index, np.uint64)
    pending = np.ones(len(result), bool)
    while pending.any():
        left, right = result[pending] >> shift, result[pending] & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(right, key + round_number) & mask)
        result[pending] = (left << shift) | right
        pending = result >= size
    return result.astype(np.int64)


def mix(value: np.ndarray, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of (value, key), uint64: the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = value + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Order(Protocol):
    """Sample number -> item."""

    def __len__(self) -> int:
        """Numbers of an epoch in training, all of them in validation."""
        ...

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers >= 0 -> items, (n,) int64."""
        ...


class EpochOrder:
    """Sample ordinal -> item, epoch by epoch: each item once per epoch, in an order that differs by epoch.

    A pure function of (seed, ordinal).

    Args:
        size: number of items, >= 1.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers >= 0 -> items, (n,) int64 in [0, size)."""
        epochs, places = np.divmod(numbers, self.size)
        items = np.empty(len(numbers), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = permute(places[chosen], self.size, derive_key(self.seed, epoch, 1))
        return items


class SpreadOrder:
    """Number -> item for a validation: all items in order, or ``max_items`` evenly spread over them."""

    def __init__(self, size: int, *, max_items: int | None = None) -> None:
        self.size = size
        self.count = size if max_items is None else min(size, max_items)

    def __len__(self) -> int:
        return self.count

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers in [0, len) -> items, (n,) int64."""
        return np.asarray(numbers, np.int64) * self.size // max(1, self.count)
