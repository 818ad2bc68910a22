"""The Hopper backward: what a block of it takes, what it is given to do, and which scores it masks."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from build_support.instantiations import SM90_BACKWARD_HEAD_DIMS

SHARED_BYTES = 227 * 1024  # that a block may have
LAUNCH_REGISTERS = 168  # of each of 384 threads
ROWS, COLUMNS = 64, 128  # of the tiles at head dim 128
UNBOUNDED = (-1, -1, 0)
DENSE_AND_PACKED = pytest.mark.parametrize(
    "cu_q, cu_k",
    [((), ()), ((0, 100, 100, 400, 400, 529), (0, 130, 400, 400, 528, 700))],
    ids=["dense", "packed"],
)


@pytest.fixture(params=SM90_BACKWARD_HEAD_DIMS, ids=str)
def config(request: pytest.FixtureRequest, host: Callable[..., list[Any]]) -> dict[str, Any]:
    head_dim, head_dim_v = request.param
    answer = host([("backward_config", head_dim)])[0]
    assert answer["head_dim"] == head_dim == head_dim_v
    return answer


def test_registers(config: dict[str, Any]) -> None:
    consumers, producer, consumer = (
        config[name] for name in ("consumers", "producer_registers", "consumer_registers")
    )
    assert config["threads"] == 128 * (consumers + 1)
    assert consumers * consumer + producer <= (consumers + 1) * LAUNCH_REGISTERS
    assert producer % 8 == consumer % 8 == 0
    # dK and dV, scores and their gradient or their 16-bit copies with dQ, and a few for all the rest
    accumulators, scores = config["head_dim"], config["rows"]
    assert accumulators + scores + 24 <= consumer
    assert accumulators + scores // 2 + 4 * config["query_fragments"] + 24 <= consumer


def test_shared_memory(config: dict[str, Any]) -> None:
    width = config["head_dim"] * 2
    regions = [(address, config["columns"] * width) for address in config["key_tiles"]]
    regions += [(address, config["rows"] * width) for address in config["query_tiles"]]
    regions += [(address, config["rows"] * config["columns"] * 2) for address in config["score_tiles"]]
    regions += [(address, config["slice_bytes"]) for address in config["slices"]]
    assert config["consumers"] * config["slice_bytes"] == config["rows"] * config["head_dim"] * 4
    end = 0
    for address, size in sorted(regions):
        assert address == end and address % 1024 == 0  # the swizzle's period
        end += size
    assert end == config["storage"]
    vectors = sorted(config["vectors"])
    assert all(address % 16 == 0 and address >= end for address in vectors)
    assert all(b - a >= 4 * config["rows"] for a, b in itertools.pairwise(vectors))
    assert config["bytes"] <= SHARED_BYTES


def sees(lengths: tuple[int, int], window: tuple[int, int, int], query: int, key: int) -> bool:
    left, right, top_left = window
    diagonal = query + (0 if top_left else lengths[1] - lengths[0])
    return (
        0 <= query < lengths[0]
        and 0 <= key < lengths[1]
        and (left < 0 or key >= diagonal - left)
        and (right < 0 or key <= diagonal + right)
    )


@pytest.mark.parametrize("window", [UNBOUNDED, (-1, 0, 0), (70, 5, 0), (40, 0, 1)])
@pytest.mark.parametrize(
    "heads, group, splits, interleave", [(2, 1, 1, 1), (6, 3, 1, 2), (6, 3, 2, 4), (5, 5, 5, 3)]
)
@DENSE_AND_PACKED
def test_every_key_tile_and_head_is_done_once(
    host: Callable[..., list[Any]],
    window: tuple[int, int, int],
    heads: int,
    group: int,
    splits: int,
    interleave: int,
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
) -> None:
    batch = len(cu_q) - 1 if cu_q else 2
    rows_q, rows_k = (600, 750) if cu_q else (300, 400)
    lists = (len(cu_q), *cu_q, len(cu_k), *cu_k)
    (works,) = host([
        ("backward_works", batch, heads, group, splits, interleave, rows_q, rows_k, *window, *lists)
    ])  # fmt: skip
    lengths = [
        (cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]) if cu_q else (rows_q, rows_k) for b in range(batch)
    ]
    owners: Counter[tuple[int, int, int, int]] = Counter()
    scratch: dict[int, tuple[int, int, int]] = {}
    for index, kv_head, split, first_key, *numbers in works:
        owners[index, kv_head, split, first_key // COLUMNS] += 1
        visits = [tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
        if index == batch:  # rows behind the last sequence
            assert not visits
            continue
        shape = lengths[index]
        visible = {
            tile
            for tile in range(-(-shape[0] // ROWS))
            for query in range(tile * ROWS, (tile + 1) * ROWS)
            for key in (first_key, *range(first_key, first_key + COLUMNS, 9), first_key + COLUMNS - 1)
            if sees(shape, window, query, key)
        }
        first, end = (kv_head * group + part * group // splits for part in (split, split + 1))
        done = [(head, tile) for head, tile, _ in visits]
        assert len(set(done)) == len(done)
        assert {head for head, _ in done} <= set(range(first, end))
        for head in range(first, end):
            assert visible <= {tile for other, tile in done if other == head}
        for head, tile, place in visits:
            assert scratch.setdefault(place, (index, head, tile)) == (index, head, tile)
    assert set(owners.values()) == {1}
    for index, (_, keys) in enumerate(lengths):
        for kv_head in range(heads // group):
            for split in range(splits):
                for tile in range(-(-keys // COLUMNS)):
                    assert owners[index, kv_head, split, tile] == 1


@pytest.mark.parametrize("window", [UNBOUNDED, (-1, 0, 0), (70, 5, 0), (40, 0, 1), (130, -1, 0)])
@pytest.mark.parametrize("heads, group, splits, interleave", [(2, 1, 1, 1), (6, 3, 2, 4), (4, 2, 1, 100)])
@DENSE_AND_PACKED
def test_a_deterministic_block_waits_for_no_later_one(
    host: Callable[..., list[Any]],
    window: tuple[int, int, int],
    heads: int,
    group: int,
    splits: int,
    interleave: int,
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
) -> None:
    """Blocks start in order: those that add to one tile of dQ have the turns 0, 1, 2 ..., so that none is stuck."""
    batch, rows = (len(cu_q) - 1, (600, 750)) if cu_q else (2, (300, 400))
    lists = (len(cu_q), *cu_q, len(cu_k), *cu_k)
    shape = (batch, heads, group, splits, interleave)
    blocks, works = host([(name, *shape, *rows, *window, *lists) for name in ("turns", "backward_works")])
    turns: dict[int, list[int]] = defaultdict(list)
    for numbers in blocks:
        for place, turn in zip(numbers[::2], numbers[1::2], strict=True):
            turns[place].append(turn)
    assert all(of_tile == list(range(len(of_tile))) for of_tile in turns.values())
    visits = Counter(place for _, _, _, _, *numbers in works for place in numbers[2::3])
    assert {place: len(of_tile) for place, of_tile in turns.items()} == visits


def test_long_key_tiles_come_first_under_a_causal_mask(host: Callable[..., list[Any]]) -> None:
    (works,) = host([("backward_works", 1, 4, 1, 1, 4, 1024, 1024, -1, 0, 0, 0, 0)])
    visits = [len(numbers) for *_, numbers in ((work[:4], work[4:]) for work in works)]
    assert visits == sorted(visits, reverse=True) and visits[0] > visits[-1]


@pytest.mark.parametrize("window", [UNBOUNDED, (-1, 0, 0), (-1, 3, 1), (20, 5, 0), (20, -1, 0), (7, 0, 1)])
@pytest.mark.parametrize("lengths", [(64, 64), (100, 50), (40, 130)])
def test_transposed_mask(
    host: Callable[..., list[Any]], window: tuple[int, int, int], lengths: tuple[int, int]
) -> None:
    places = [(key, query) for key in (0, 5, 40, 48, 100) for query in (0, 2, 30, 90)]
    begins = int(window[0] >= 0)
    answers = host([("masked_transposed", *lengths, *window, begins, *place) for place in places])
    for (key, query), fragments in zip(places, answers, strict=True):
        for j, fragment in enumerate(fragments):
            for e, kept in enumerate(fragment):
                at = query + 8 * j + e % 2, key + 8 * (e // 2)
                if at[0] < lengths[0]:  # rows of queries past the end have the probability 0 by their LSE
                    assert bool(kept) == sees(lengths, window, *at), at
