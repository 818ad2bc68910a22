"""Which keys a tile of queries is computed with, and the mask: against the rule, key by key."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product, starmap
from typing import Any

import pytest
import torch
from torch import Tensor

ROWS = (64, 128, 192)
COLUMNS = (64, 80, 96, 112, 128)
LONGEST = 2**30 - 256  # kMaxSeqlen


@dataclass(frozen=True)
class Rule:
    """Key j is visible to query i iff i + shift - left <= j <= i + shift + right; -1 is no bound."""

    seqlen_q: int
    seqlen_k: int
    left: int
    right: int
    top_left: int

    @property
    def shift(self) -> int:
        return 0 if self.top_left else self.seqlen_k - self.seqlen_q

    def sees(self, query: int, key: int) -> bool:
        distance = key - query - self.shift
        return (self.left < 0 or distance >= -self.left) and (self.right < 0 or distance <= self.right)

    def mask(self, rows: int, columns: int) -> Tensor:
        """(rows, columns), False for what is no key; queries past the end see what they would see."""
        queries, keys = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        distance = keys - queries - self.shift
        visible = keys < self.seqlen_k
        if self.left >= 0:
            visible = visible & (distance >= -self.left)
        if self.right >= 0:
            visible = visible & (distance <= self.right)
        return visible.expand(rows, columns)


def some_rules(count: int, longest: int) -> list[Rule]:
    random.seed(0)
    lengths = (0, 1, 63, 64, 65, 128, 130, 200, 257, longest)
    sides = (-1, 0, 1, 40, 64, 127, 200, 2 * longest)
    rules = [
        Rule(
            *(random.choice([*lengths, random.randrange(longest)]) for _ in "qk"),
            *(random.choice(sides) for _ in "lr"),
            random.randrange(2),
        )
        for _ in range(count)
    ]
    return [*rules, Rule(longest, longest, -1, 0, 0), Rule(longest, longest, -1, -1, 0)]


def all_rules(longest: int) -> list[Rule]:
    sides = (-1, 0, 1, 2, 5)
    return list(starmap(Rule, product(range(longest + 1), range(longest + 1), sides, sides, (0, 1))))


def per_tile(mask: Tensor, columns: int) -> Tensor:
    """(rows, keys) -> (key tiles, rows * columns)."""
    return mask.unflatten(1, (-1, columns)).transpose(0, 1).flatten(1)


Tile = tuple[Rule, int, int, int]  # first query, rows, columns


def tiles_of(rule: Rule, rows: int, columns: int) -> list[Tile]:
    return [(rule, query, rows, columns) for query in range(0, max(rule.seqlen_q, 1), rows)]


def check_ranges(host: Callable[..., list[Any]], places: list[Tile], longest: int) -> None:
    requests = [("visible_tiles", *astuple(rule), *tile) for rule, *tile in places]
    for (rule, query, rows, columns), (begin, clean_begin, clean_end, end) in zip(
        places, host(requests), strict=True
    ):
        tiles = -(-longest // columns)
        mask = rule.mask(query + rows, tiles * columns)[query:]
        exists = mask[: max(rule.seqlen_q - query, 0)]
        visible, whole = per_tile(exists, columns).any(1), per_tile(exists, columns).all(1)
        inside = torch.zeros(tiles, dtype=torch.bool)
        inside[begin : max(end, begin)] = True
        case = f"{rule}, queries {query} to {query + rows}, tiles of {columns} keys: {begin} {end}"
        assert begin >= 0 and end <= tiles, case
        assert not (visible & ~inside).any(), case
        if begin >= end:
            continue
        assert begin <= clean_begin <= clean_end <= end, case
        assert whole[clean_begin:clean_end].all(), case
        first_key = query + rule.shift - rule.left if rule.left >= 0 else 0
        # With queries past the end, or windows past the last key, a range may be longer than it need be.
        if len(exists) == rows and first_key < rule.seqlen_k:
            assert visible[begin] and visible[end - 1], case
            keys = torch.arange(tiles) * columns + columns <= rule.seqlen_k
            clean = torch.zeros(tiles, dtype=torch.bool)
            clean[clean_begin:clean_end] = True
            assert torch.equal(clean, inside & keys & whole), case


def test_ranges_hold_what_is_visible_and_clean_tiles_need_no_mask(host: Callable[..., list[Any]]) -> None:
    longest = 400
    places = [
        tile
        for rule in some_rules(400, longest)
        for tile in tiles_of(rule, random.choice(ROWS), random.choice(COLUMNS))
    ]
    check_ranges(host, places, longest)


def test_ranges_of_small_tiles_one_and_all(host: Callable[..., list[Any]]) -> None:
    """Every way in which a diagonal can lie to the edges of tiles, which have no least size."""
    longest = 8
    check_ranges(host, [tile for rule in all_rules(longest) for tile in tiles_of(rule, 4, 3)], longest)


def test_a_consumers_range_is_inside_its_tiles(host: Callable[..., list[Any]]) -> None:
    requests, widths = [], []
    for rule in some_rules(200, 500):
        rows, columns = random.choice(ROWS[1:]), random.choice(COLUMNS)
        for query in range(0, rule.seqlen_q, rows):
            parts = [(query, rows), *((part, 64) for part in range(query, query + rows, 64))]
            requests += [("visible_tiles", *astuple(rule), *part, columns) for part in parts]
            widths.append(len(parts))
    answers = iter(host(requests))
    for width in widths:
        (begin, _, _, end), *parts = (next(answers) for _ in range(width))
        for part_begin, _, _, part_end in parts:
            assert part_begin >= part_end or begin <= part_begin < part_end <= end


def test_one_tile_is_clean(host: Callable[..., list[Any]]) -> None:
    requests, expected = [], []
    for rule in some_rules(400, 300):
        rows, columns = random.choice(ROWS), random.choice(COLUMNS)
        query, key = rows * random.randrange(3), columns * random.randrange(3)
        requests.append(("clean", *astuple(rule), query, rows, key, columns))
        expected.append(int(rule.mask(query + rows, key + columns)[query:, key:].all()))
    assert host(requests) == expected and 0 < sum(expected) < len(expected)


def check_query_tiles(host: Callable[..., list[Any]], rules: list[Rule], rows: int, columns: int) -> None:
    """Tiles of queries and of keys name each other: a block of keys visits just the tiles that wait for it."""
    queries = [(rule, m) for rule in rules for m in range(-(-rule.seqlen_q // rows))]
    keys = [(rule, n) for rule in rules for n in range(-(-rule.seqlen_k // columns))]
    seen = host([("visible_tiles", *astuple(rule), m * rows, rows, columns) for rule, m in queries])
    visited = host([("visible_queries", *astuple(rule), n * columns, columns, rows) for rule, n in keys])
    by_queries = {
        (rule, m, n)
        for (rule, m), (begin, _, _, end) in zip(queries, seen, strict=True)
        for n in range(begin, end)
    }
    by_keys = {
        (rule, m, n) for (rule, n), (begin, end) in zip(keys, visited, strict=True) for m in range(begin, end)
    }
    assert by_queries == by_keys, (rows, columns, by_queries ^ by_keys)


def test_query_tiles_are_those_that_see_a_key_tile(host: Callable[..., list[Any]]) -> None:
    check_query_tiles(host, all_rules(8), 4, 3)
    for rows, columns in ((128, 128), (64, 128), (64, 96)):
        check_query_tiles(host, some_rules(150, 700), rows, columns)


@pytest.mark.parametrize(
    "lengths", [(LONGEST, 1), (1, LONGEST), (LONGEST, LONGEST), (300, LONGEST), (LONGEST, 300)]
)
def test_nothing_overflows_at_the_longest_sequences(
    host: Callable[..., list[Any]], lengths: tuple[int, int]
) -> None:
    """Ranges, clean tiles and masks at both ends, with unbounded sides that are larger than every distance."""
    rows, columns = 192, 128
    seqlen_q, seqlen_k = lengths
    last_query, last_key = (
        (length - 1) // tile * tile for length, tile in zip(lengths, (rows, columns), strict=True)
    )
    for sides, top_left in product(((-1, -1), (-1, 0), (0, -1), (LONGEST, LONGEST)), (0, 1)):
        rule = Rule(seqlen_q, seqlen_k, *sides, top_left)
        places = list(product((0, last_query), (0, last_key)))
        ranges = host([("visible_tiles", *astuple(rule), query, rows, columns) for query, _ in places])
        visits = host([("visible_queries", *astuple(rule), key, columns, rows) for _, key in places])
        for (query, key), (begin, _, _, end), (first, behind) in zip(places, ranges, visits, strict=True):
            corners = product(
                {query, min(query + rows, seqlen_q) - 1}, {key, min(key + columns, seqlen_k) - 1}
            )
            if any(rule.sees(*corner) for corner in corners):
                assert begin <= key // columns < end and first <= query // rows < behind, (rule, query, key)
        for begins in (0, 1) if rule.left < 0 else (1,):
            rows_of = host([("masked", *astuple(rule), begins, *place) for place in places])
            of_keys = host(
                [("masked_transposed", *astuple(rule), begins, key, query) for query, key in places]
            )
            for (query, key), kept, transposed in zip(places, rows_of, of_keys, strict=True):
                for j, e in product(range(6), range(4)):
                    i, at = query + 8 * (e // 2), key + 8 * j + e % 2
                    assert bool(kept[j][e]) == (at < seqlen_k and rule.sees(i, at)), (rule, i, at)
                    i, at = query + 8 * j + e % 2, key + 8 * (e // 2)
                    assert bool(transposed[j][e]) == (at < seqlen_k and rule.sees(i, at)), (rule, i, at)


def test_ranges_of_long_sequences_do_not_overflow(host: Callable[..., list[Any]]) -> None:
    length, rows, columns = 2**29, 128, 112
    last = length // rows * rows - rows
    causal, window, full = (-1, 0), (4096, 0), (-1, -1)
    answers = host(
        [
            ("visible_tiles", length, length, *sides, 0, last, rows, columns)
            for sides in (causal, window, full)
        ]
    )
    tiles = -(-length // columns)
    assert [(begin, end) for begin, _, _, end in answers] == [
        (0, tiles),
        ((last - 4096) // columns, tiles),
        (0, tiles),
    ]


@pytest.mark.parametrize("begins", [0, 1])
def test_the_mask_keeps_exactly_the_keys_of_each_row(host: Callable[..., list[Any]], begins: int) -> None:
    """A lane has rows g and g + 8, and of every 8 columns 2 q and 2 q + 1; g = lane / 4, q = lane % 4."""
    rules = [rule for rule in some_rules(60, 300) if begins or rule.left < 0]
    places = [(rule, 16 * random.randrange(20), 16 * random.randrange(20)) for rule in rules]
    lanes = [(lane // 4, 2 * (lane % 4)) for lane in range(32)]
    answers = iter(
        host(
            [
                ("masked", *astuple(rule), begins, query + row, key + column)
                for rule, query, key in places
                for row, column in lanes
            ]
        )
    )
    for rule, query, key in places:
        for row, column in lanes:
            for j, fragment in enumerate(next(answers)):
                for e, kept in enumerate(fragment):
                    i, at = query + row + 8 * (e // 2), key + column + 8 * j + e % 2
                    assert bool(kept) == (at < rule.seqlen_k and rule.sees(i, at)), (rule, i, at)
