"""Which block of the decode kernel does what: all of them together do everything, once."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from .decode_calls import TILE_ROWS, Call, a_call

Host = Callable[..., list[Any]]
Item = tuple[int, int, int]  # sequence, key-value head, tile of rows


def tiles_of_items(call: Call, columns: int) -> dict[Item, set[int]]:
    """Of all rows, the tiles of keys that some query of the sequence sees."""
    items = {}
    for index in call.sequences:
        _, queries = call.queries(index)
        if queries == 0:
            continue
        keys = call.mask(index).any(0).nonzero().flatten()
        tiles = set((keys // columns).tolist())
        for head in range(call.heads // call.group):
            for row_tile in range(-(-queries * call.group // TILE_ROWS)):
                items[index, head, row_tile] = tiles
    return items


def check(call: Call, columns: int, answer: dict[str, Any]) -> int:
    """The number of pieces."""
    blocks, items, slots = answer["grid"]
    assert len(answer["blocks"]) == (blocks if items > 0 else 0), call
    tiles: dict[Item, list[int]] = defaultdict(list)
    parts: dict[Item, list[int]] = defaultdict(list)
    numbers: dict[Item, set[int]] = defaultdict(set)
    places: dict[Item, set[tuple[int, ...]]] = defaultdict(set)
    pieces = list(itertools.chain.from_iterable(answer["blocks"]))
    for (index, head, row_tile, number, begin, end, part, count), all_slots in pieces:
        item = index, head, row_tile
        assert begin <= end, call
        tiles[item] += range(begin, end)
        parts[item].append(part)
        numbers[item].add(number)
        places[item].add(tuple(all_slots))
        assert len(all_slots) == (count if count > 1 else 0), call
        assert begin < end or count == 1, (call, item)  # a part that is merged has something

    expected = tiles_of_items(call, columns)
    assert set(tiles) == set(expected), call
    for item, visible in expected.items():
        assert sorted(tiles[item]) == sorted(visible), (call, item)
        assert sorted(parts[item]) == list(range(len(parts[item]))), (call, item)
        assert len(places[item]) == 1, (call, item)  # all parts agree where they are and how many
        assert len(next(iter(places[item]))) in (0, len(parts[item])), (call, item)
        assert len(parts[item]) == 1 or len(next(iter(places[item]))) > 1, (call, item)
    all_numbers = [number for of_item in numbers.values() for number in of_item]
    assert len(all_numbers) == len(expected) == len(set(all_numbers)), call
    assert all(0 <= number < items for number in all_numbers), call
    used = [slot for of_item in places.values() for all_slots in of_item for slot in all_slots]
    assert len(used) == len(set(used)) and all(0 <= slot < slots for slot in used), call
    return len(pieces)


def check_all(host: Host, calls: list[tuple[int, Call]]) -> list[int]:
    answers = host([("plan", columns, *call.numbers()) for columns, call in calls])
    return [check(call, columns, answer) for (columns, call), answer in zip(calls, answers, strict=True)]


def some_calls(count: int, batches: tuple[int, ...]) -> list[tuple[int, Call]]:
    calls = []
    for _ in range(count):
        batch = random.choice(batches)
        capacity = random.choice((0, 1, 64, 300, 2000, 5000))
        call = a_call(batch, random.choice((1, 2, 5, 16)), random.choice((1, 2, 8)), capacity, 12)
        calls.append((random.choice((32, 64)), call))
    return calls


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_equal_ranges_cover_every_item_once(decode_host: Host, multiprocessors: int) -> None:
    random.seed(multiprocessors)
    calls = some_calls(5 if multiprocessors == 132 else 20, (1, 3, 40, 70))
    for _, call in calls:
        call.multiprocessors = multiprocessors
    pieces = check_all(decode_host, calls)
    assert max(pieces) > 3 * multiprocessors or multiprocessors == 132


def test_equal_ranges_keep_all_blocks_busy(decode_host: Host) -> None:
    """One for each multiprocessor, or two where there is little to do."""
    for tiles, expected in ((10, [5] * 264), (20, [20] * 132)):
        keys = 64 * 132 * tiles
        call = Call(heads=8, group=8, rows=1, capacity=keys, left=-1, right=0, lengths=[keys])
        (answer,) = decode_host([("plan", 64, *call.numbers())])
        check(call, 64, answer)
        lengths = [sum(end - begin for (*_, begin, end, _, _), _ in pieces) for pieces in answer["blocks"]]
        assert lengths == expected


def test_all_heads_are_cut_at_the_same_places(decode_host: Host) -> None:
    call = Call(heads=32, group=4, rows=1, capacity=5000, left=-1, right=0, lengths=[5000, 1234, 4999])
    (answer,) = decode_host([("plan", 64, *call.numbers())])
    check(call, 64, answer)
    assert len(answer["blocks"]) == 33 * 8
    ranges: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for pieces in answer["blocks"]:
        for (index, head, _, _, begin, end, _, _), _ in pieces:
            ranges[head].append((index, begin, end))
    assert len(ranges) == 8 and all(cuts == ranges[0] for cuts in ranges.values())


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 1000])
def test_equal_parts_cover_every_item_once(decode_host: Host, num_splits: int) -> None:
    random.seed(num_splits)
    calls = some_calls(12, (1, 3) if num_splits <= 3 else (1,))
    for _, call in calls:
        call.num_splits = num_splits
        if num_splits == 1000:  # more parts than there are tiles
            call.capacity = min(call.capacity, 300)
            call.leftpad = []
    check_all(decode_host, calls)


def test_parts_of_fixed_size_cover_every_item_once_and_are_the_same_in_every_batch(decode_host: Host) -> None:
    random.seed(0)
    calls = some_calls(16, (1, 3))
    for number, (_, call) in enumerate(calls):
        call.batch_invariant = True
        if number < 6:
            call.capacity = 40_000
            call.lengths = [random.randint(0, call.capacity) for _ in call.lengths]
    assert max(check_all(decode_host, calls)) > 30

    long = Call(heads=1, group=1, rows=1, capacity=40_000, left=-1, right=0, lengths=[39_000])
    long.batch_invariant = True
    others = Call(**{**vars(long), "lengths": [5, 39_000, 17_000]})
    alone, among = decode_host([("plan", 64, *call.numbers()) for call in (long, others)])

    def ranges(answer: dict[str, Any], sequence: int) -> list[tuple[int, int]]:
        pieces = itertools.chain.from_iterable(answer["blocks"])
        return [(begin, end) for (index, *_, begin, end, _, _), _ in pieces if index == sequence]

    assert len(ranges(alone, 0)) > 10
    assert ranges(alone, 0) == ranges(among, 1)


@pytest.mark.parametrize("options", [{}, {"num_splits": 2}, {"batch_invariant": True}], ids=str)
def test_cumulative_lengths_that_fall_have_no_more_items(decode_host: Host, options: dict[str, Any]) -> None:
    """Their rows, counted again and again, may be more than the scratch is for."""
    call = Call(
        heads=4, group=2, rows=90, capacity=300, left=-1, right=0, lengths=[300, 40, 200, 300, 9],
        cu_seqlens=[0, 90, 0, 90, -5, 90], **options,
    )  # fmt: skip
    (answer,) = decode_host([("plan", 64, *call.numbers())])
    _, items, slots = answer["grid"]
    pieces = list(itertools.chain.from_iterable(answer["blocks"]))
    assert pieces and all(0 <= number < items for (_, _, _, number, *_), _ in pieces)
    assert all(0 <= slot < slots for (*_, part, _), places in pieces for slot in places[: part + 1])


def test_long_queries_are_aligned_as_few_ones_are(decode_host: Host) -> None:
    """They take other kernels. Keys that the cache has no room for count for the alignment."""
    random.seed(0)
    calls = [call for _, call in some_calls(60, (1, 3, 40))]
    for call in calls:
        call.leftpad, call.left, call.right = [], -1, -1
    overfull = 0
    for call, answers in zip(
        calls, decode_host([("alignments", *call.numbers()) for call in calls]), strict=True
    ):
        for keys, shift, keys_of_long, shift_of_long in answers:
            assert (max(keys, 0), shift) == (keys_of_long, shift_of_long), call
        overfull += sum(call.length(index) > call.capacity for index in range(len(call.lengths)))
    assert overfull > 10


def test_tiles_are_counted_in_32_bits(decode_host: Host) -> None:
    """Long queries to long caches: 8 sequences of 128 Ki rows and keys have 2^30 tiles of keys for each head."""
    long = Call(heads=64, group=8, rows=131_072, capacity=131_072, left=-1, right=0, lengths=[131_072] * 8)
    short = Call(**{**vars(long), "rows": 4})
    (blocks, items, slots), few = decode_host([("grid", 64, *call.numbers()) for call in (long, short)])
    assert blocks == items == 8 * 8 * 131_072 * 8 // TILE_ROWS and slots == 0  # every item in one part
    assert few == [16 * 8, 8 * 8 * 2, 2 * 16 * 8]


def test_nothing_to_compute_is_no_item(decode_host: Host) -> None:
    calls = [
        Call(heads=2, group=1, rows=0, capacity=64, left=-1, right=0, lengths=[3, 4]),
        Call(heads=2, group=1, rows=3, capacity=64, left=-1, right=0, lengths=[]),
        Call(heads=0, group=0, rows=3, capacity=64, left=-1, right=0, lengths=[3]),
    ]
    for call, num_splits, invariant in itertools.product(calls, (0, 1, 3), (False, True)):
        call.num_splits, call.batch_invariant = num_splits, invariant
        ((_, items, slots),) = decode_host([("grid", 64, *call.numbers())])
        assert items == slots == 0
