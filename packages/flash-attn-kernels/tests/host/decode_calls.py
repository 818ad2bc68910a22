"""Calls of attention on a cache, made at random, and what they mean."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE_ROWS = 16


@dataclass
class Call:
    """`cu_seqlens` is empty for dense queries, `leftpad` without; sides of the window are -1 without a bound.

    ``added`` rows are appended to each sequence, or as ``cu_added`` says.
    """

    heads: int
    group: int
    rows: int  # of q, all together if they are packed
    capacity: int
    left: int
    right: int
    lengths: list[int]
    leftpad: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=list)
    num_splits: int = 0
    batch_invariant: bool = False
    multiprocessors: int = 132
    added: int = 0
    cu_added: list[int] = field(default_factory=list)

    def numbers(self) -> list[int]:
        lists = [[len(x), *x] for x in (self.lengths, self.leftpad, self.cu_seqlens)]
        first = [self.heads, self.group, self.rows, self.capacity, self.left, self.right]
        last = [self.num_splits, int(self.batch_invariant), self.multiprocessors, self.added]
        return [*first, *itertools.chain.from_iterable(lists), *last, len(self.cu_added), *self.cu_added]

    def length(self, index: int) -> int:
        """Keys of a sequence, also those that the cache has no room for."""
        if index == len(self.lengths):
            return 0
        added = self.added
        if self.cu_added:
            added = self.cu_added[index + 1] - self.cu_added[index]
        return max(self.lengths[index] + added, 0)

    @property
    def sequences(self) -> range:
        """With what packed rows behind the last one form."""
        return range(len(self.lengths) + (1 if self.cu_seqlens else 0))

    def queries(self, index: int) -> tuple[int, int]:
        """First and number, in the tensor or, if dense, in the sequence's matrix."""
        if not self.cu_seqlens:
            return 0, self.rows
        begin, end = [*self.cu_seqlens, self.rows][index : index + 2]
        return begin, end - begin

    def mask(self, index: int) -> Tensor:
        """(queries, keys that there is room for) of a sequence: what is visible."""
        _, count = self.queries(index)
        # Windows are aligned by the whole length, also where the cache ends before.
        length = self.length(index)
        pad = self.leftpad[index] if self.leftpad and index < len(self.lengths) else 0
        queries, keys = torch.arange(count)[:, None], torch.arange(self.capacity)[None, :]
        distance = keys - (queries + length - count)
        visible = ((keys >= pad) & (keys < length)).expand(count, -1)
        if self.left >= 0:
            visible = visible & (distance >= -self.left)
        if self.right >= 0:
            visible = visible & (distance <= self.right)
        return visible


def a_call(batch: int, group: int, kv_heads: int, capacity: int, most_queries: int) -> Call:
    """Of any kind but for num_splits and the like."""
    edges = (0, 1, capacity, capacity + 5, -3)
    lengths = [
        random.choice([*edges, *(random.randint(0, capacity) for _ in "123456")]) for _ in range(batch)
    ]
    call = Call(
        heads=group * kv_heads,
        group=group,
        rows=random.randint(1, most_queries),
        capacity=capacity,
        left=random.choice((-1, -1, 0, 5, 70, capacity)),
        right=random.choice((-1, 0, 0, 1, 70)),
        lengths=lengths,
    )
    if random.randrange(2):
        call.leftpad = [random.randint(0, random.choice((1, 70, capacity))) for _ in lengths]
    if random.randrange(2):
        counts = [random.choice((0, 1, random.randint(0, most_queries))) for _ in lengths]
        call.cu_seqlens = [0, *torch.tensor(counts).cumsum(0).tolist()]
        call.rows = call.cu_seqlens[-1] + random.choice((0, 0, 3, 40))
    call.added = random.choice((0, 0, 1, 7))
    if call.added and random.randrange(2):
        call.cu_added = [0, *torch.tensor([random.choice((0, 1, 9)) for _ in lengths]).cumsum(0).tolist()]
        call.added = call.cu_added[-1] + 2
    return call
