"""Batches as a function of their number, for a process among several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from flash_attn_train.data.share import Share

Batch = dict[str, Any]


class Samples(Protocol):
    """Samples as a pure function of their number."""

    def __len__(self) -> int:
        """Samples per epoch in training; samples in all in validation."""
        ...

    def batch(self, numbers: np.ndarray) -> Batch:
        """The samples with these numbers, (n,) int64, stacked. In training numbers go on without end; in validation
        they are below ``len``. ``batch["labels"]`` is integer in validation."""
        ...


class TrainBatches(Dataset):
    """Micro batch number i = 0, 1, 2, ... of one rank, see :class:`flash_attn_train.data.share.Share`."""

    def __init__(self, samples: Samples, share: Share) -> None:
        self.samples, self.share = samples, share

    def __getitem__(self, number: int) -> Batch:
        return self.samples.batch(self.share.ordinals(number))


class ValidationBatches(Dataset):
    """One rank's part of the validation samples: every sample on one rank, once, and the same number of batches of
    the same size on every rank.

    The samples are dealt out evenly over the batches. What a batch lacks to ``batch_size`` is filled with copies whose
    labels are -100, which no loss and no metric counts.
    With at least two samples per batch and as many samples as ranks, every batch has one that counts; with a
    batch_size of 1, a last one may have none.
    """

    def __init__(self, samples: Samples, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.samples) // (self.batch_size * self.world_size))

    def numbers(self, number: int) -> np.ndarray:
        """Samples of batch ``number``, (at most batch_size,) int64."""
        first, stop = (step * len(self.samples) // len(self) for step in (number, number + 1))
        return np.arange(first + self.rank, stop, self.world_size, dtype=np.int64)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        numbers = self.numbers(number)
        filler = np.zeros(self.batch_size - len(numbers), np.int64)
        batch = self.samples.batch(np.concatenate([numbers, filler]))
        batch["labels"][len(numbers) :] = -100
        return batch


class CountFrom(Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1
