"""Batches as a function of (seed, number): nothing to save and nothing to fast-forward when a run resumes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class TrainBatches(Dataset):
    """Batch number i, i = 0, 1, 2, ...: (batch_size, seqlen + 1) int64; inputs are [:, :-1] and targets [:,
        1:].

    Epoch by epoch, the tokens are cut into windows of ``seqlen`` (each with one more token as last target),
    from an offset that differs by epoch, and visited in an order that differs by epoch, each window once.
    Offset and order are pure functions of (seed, epoch), so batch i is a pure function of (seed, i).

    Args:
        tokens: (n,) unsigned integers, n > seqlen.
    """

    def __init__(self, tokens: np.ndarray, *, seqlen: int, batch_size: int, seed: int) -> None:
        self.tokens, self.seqlen, self.batch_size, self.seed = tokens, seqlen, batch_size, seed
        # One window less than would fit leaves room to move the offset; with a single window there is none to
        # spare.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // seqlen - 1)
        self._slack = len(tokens) - 1 - self.windows_per_epoch * seqlen

    def __getitem__(self, number: int) -> torch.Tensor:
        ordinals = number * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(ordinals, self.windows_per_epoch)
        starts = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            offset = int(_mix(np.array([0], np.uint64), self._key(epoch, 0))[0] % np.uint64(self._slack + 1))
            starts[chosen] = offset + self.seqlen * permute(
                places[chosen], self.windows_per_epoch, self._key(epoch, 1)
            )
        return _gather(self.tokens, starts, self.seqlen)

    def _key(self, epoch: int, purpose: int) -> int:
        return int(np.random.SeedSequence([self.seed, int(epoch), purpose]).generate_state(1, np.uint64)[0])


class ValidationBatches(Dataset):
    """Consecutive windows of the held-out tokens: all of them, or ``max_sequences`` spread evenly over them.

    Batch i is (at most batch_size, seqlen + 1) int64; only the last one can be smaller.
    """

    def __init__(
        self, tokens: np.ndarray, *, seqlen: int, batch_size: int, max_sequences: int | None = None
    ) -> None:
        self.tokens, self.seqlen, self.batch_size = tokens, seqlen, batch_size
        windows = (len(tokens) - 1) // seqlen
        count = windows if max_sequences is None else min(windows, max_sequences)
        self.starts = seqlen * (np.arange(count, dtype=np.int64) * windows // count)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.batch_size
        return _gather(self.tokens, self.starts[first : first + self.batch_size], self.seqlen)


class CountFrom(Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


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
            left, right = right, left ^ (_mix(right, key + round_number) & mask)
        result[pending] = (left << shift) | right
        pending = result >= size
    return result.astype(np.int64)


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of (value, key): the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = value + np.uint64((key * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _gather(tokens: np.ndarray, starts: np.ndarray, seqlen: int) -> torch.Tensor:
    windows = tokens[starts[:, None] + np.arange(seqlen + 1)]
    return torch.from_numpy(windows.astype(np.int64))
