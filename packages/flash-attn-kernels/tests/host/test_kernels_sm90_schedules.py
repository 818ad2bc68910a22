"""The Hopper kernels, run on the CPU without their numbers: no race, no deadlock, all work once.

The program draws by lot which warp goes on and when a copy arrives. It ends with a message where a copy goes to memory
that is still read, a product reads what has not arrived, is not fenced or lies behind its sequence, a barrier gets too
many arrivals, results leave their tensors, or nobody can go on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

Host = Callable[..., list[Any]]
BACKWARD_ROWS = {64: 128, 128: 64}  # of a tile of queries, by head dim
BACKWARD_COLUMNS, CONSUMERS = 128, 2
CASES = 40


@dataclass(frozen=True)
class Call:
    head_dim: int
    batch: int
    heads: int
    group: int
    rows: tuple[int, int]  # of queries, of keys
    window: tuple[int, int]  # left, right; -1 is no bound
    used: tuple[list[int], list[int]]  # rows of each sequence that take part; empty: all

    def numbers(self) -> list[int]:
        lists = [number for used in self.used for number in (len(used), *used)]
        return [self.head_dim, self.batch, self.heads, self.group, *self.rows, *self.window, *lists]

    def lengths(self, index: int) -> tuple[int, int]:
        (used_q, used_k), (rows_q, rows_k) = self.used, self.rows
        return used_q[index] if used_q else rows_q, used_k[index] if used_k else rows_k

    def visible_tiles(self, rows: int, columns: int) -> set[tuple[int, int, int]]:
        """(sequence, first query, first key) of the tiles in which some query sees some key."""
        left, right = self.window
        visible = set()
        for index in range(self.batch):
            seqlen_q, seqlen_k = self.lengths(index)
            for query in range(seqlen_q):
                diagonal = query + seqlen_k - seqlen_q
                first = 0 if left < 0 else max(0, diagonal - left)
                last = seqlen_k - 1 if right < 0 else min(seqlen_k - 1, diagonal + right)
                for key in range(first // columns, last // columns + 1 if first <= last else 0):
                    visible.add((index, query // rows * rows, key * columns))
        return visible


def some_call(chance: random.Random, head_dims: tuple[int, ...]) -> Call:
    batch, group = chance.randint(1, 3), chance.choice((1, 2, 3))
    rows = chance.choice((1, 64, 130, 300)), chance.choice((1, 128, 200, 400))

    def used(longest: int) -> list[int]:
        lengths = [chance.choice((0, 1, longest, chance.randint(0, longest))) for _ in range(batch)]
        return lengths if chance.randrange(2) else []

    return Call(
        head_dim=chance.choice(head_dims),
        batch=batch,
        heads=group * chance.choice((1, 2)),
        group=group,
        rows=rows,
        window=chance.choice(((-1, -1), (-1, 0), (70, 5), (40, -1), (0, 0))),
        used=(used(rows[0]), used(rows[1])),
    )


def check_backward(call: Call, answer: dict[str, Any]) -> None:
    rows = BACKWARD_ROWS[call.head_dim]
    tiles = -(-call.rows[0] // rows)
    done = Counter(map(tuple, answer["scores"]))
    places = {tuple(place) for _, _, *place in answer["scores"]}
    assert set(done.values()) <= {1}, call
    assert set(done) == {
        (kind, consumer, *place) for kind in (0, 1) for consumer in (0, 1) for place in places
    }, call
    additions: Counter[int] = Counter()
    for key, kv_head, index, query, head, same_index, scratch in places:
        assert index == same_index and head // call.group == kv_head, call
        assert scratch == (head * call.batch + index) * tiles + query // rows, call
        for consumer in range(CONSUMERS):  # each has rows of dQ, or columns of them all
            if rows == 64 or query + 64 * consumer < call.lengths(index)[0]:
                additions[CONSUMERS * scratch + consumer] += 1
        assert key < call.lengths(index)[1], call
    assert Counter(answer["additions"]) == additions, call
    visited = {(index, query, key, head) for key, _, index, query, head, _, _ in places}
    for place in call.visible_tiles(rows, BACKWARD_COLUMNS):
        assert all((*place, head) in visited for head in range(call.heads)), call


def check_forward(call: Call, answer: dict[str, Any]) -> None:
    rows, columns = answer["tile"]
    # Consumers multiply probabilities and values of the tiles that they have the scores of, one after the other.
    for consumer in {consumer for consumer, *_ in answer["scores"]}:
        keys = [numbers[4:] for numbers in answer["scores"] if numbers[0] == consumer]
        assert keys == [numbers[1:] for numbers in answer["outputs"] if numbers[0] == consumer], call
    done = Counter()
    for consumer, query, head, index, key, kv_head, same_index in answer["scores"]:
        assert index == same_index and head // call.group == kv_head, call
        done[index, query + rows * consumer, key, head] += 1
    assert set(done.values()) <= {1}, call
    for place in call.visible_tiles(rows, columns):
        assert all((*place, head) in done for head in range(call.heads)), call


@pytest.mark.parametrize("first_seed", [0, 1000])
def test_backward(kernels_host: Host, first_seed: int) -> None:
    calls, requests = [], []
    for seed in range(first_seed, first_seed + CASES):
        chance = random.Random(seed)
        call = some_call(chance, (64, 128))
        splits = chance.randint(1, call.group)
        interleave = chance.randint(1, call.heads // call.group * splits)
        calls.append(call)
        requests.append(("backward", *call.numbers(), splits, interleave, chance.randint(1, 4), seed))
    for call, answer in zip(calls, kernels_host(requests), strict=True):
        check_backward(call, answer)


@pytest.mark.parametrize("first_seed", [0, 1000])
def test_forward(kernels_host: Host, first_seed: int) -> None:
    calls, requests = [], []
    for seed in range(first_seed, first_seed + CASES):
        chance = random.Random(seed)
        call = some_call(chance, (64, 96, 128, 192, 256))
        calls.append(call)
        requests.append(("forward", *call.numbers(), chance.randrange(2), chance.randint(1, 5), seed))
    for call, answer in zip(calls, kernels_host(requests), strict=True):
        check_forward(call, answer)
