"""In which order the Hopper forward computes its tiles: all of them, the longest of a section first."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

ROWS = 128  # of a tile
CACHE_BYTES = 32 * 2**20
TYPICAL_ROWS = 4096  # of a packed sequence
FEW_ROWS = 1024
MULTIPROCESSORS = 132


def tile_of_works(host: Callable[..., list[Any]]) -> tuple[int, int]:
    """Rows and columns of the configuration that `works` takes."""
    (config,) = host([("config", 128, 128, 0)])
    return config["rows"], config["columns"]


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("matrices", [1, 2, 5, 12])
def test_every_tile_comes_once_and_sections_follow_each_other(
    host: Callable[..., list[Any]], matrices: int, ranks: int
) -> None:
    sections = sorted({1, 2, 3, 5, matrices})
    orders = host([("order", matrices, ranks, section) for section in sections])
    for section, order in zip(sections, orders, strict=True):
        assert sorted(order) == [[matrix, rank] for matrix in range(matrices) for rank in range(ranks)]
        keys = [(matrix // section, rank, matrix) for matrix, rank in order]
        assert keys == sorted(keys)  # inside a section by rank, then by matrix


@pytest.mark.parametrize("blocks", [1, 6, 7, 14, 132])
def test_blocks_share_all_positions_without_a_counter(host: Callable[..., list[Any]], blocks: int) -> None:
    rounds = 20
    (positions,) = host([("static_positions", blocks, rounds)])
    for block, of_block in enumerate(positions):
        assert of_block[0] == block  # with which blocks begin
        assert of_block == sorted(of_block)  # so that the first one past the end is a block's last
    for round in range(rounds):
        in_round = sorted(of_block[round] for of_block in positions)
        assert in_round == list(range(round * blocks, (round + 1) * blocks))


@pytest.mark.parametrize("causal", [False, True])
def test_dense_tiles_are_computed_from_the_last_queries_on(
    host: Callable[..., list[Any]], causal: bool
) -> None:
    tile_rows, tile_columns = tile_of_works(host)
    batch, heads, rows = 3, 4, 5 * tile_rows - 20
    (works,) = host([("works", batch, heads, rows, rows, -1, 0 if causal else -1, 0, 0, 0)])
    first_queries = defaultdict(list)
    for index, head, first_query, stored, first_q, first_k, seqlen_q, seqlen_k, begin, end in works:
        assert (stored, first_q, first_k, seqlen_q, seqlen_k, begin) == (rows, 0, 0, rows, rows, 0)
        keys = min(first_query + tile_rows, rows) if causal else rows
        assert end == -(-keys // tile_columns)
        first_queries[index, head].append(first_query)
    assert set(first_queries) == set(itertools.product(range(batch), range(heads)))
    for queries in first_queries.values():
        assert queries == list(range(4 * tile_rows, -1, -tile_rows))
    if causal:  # one section: the longest of all come first
        lengths = [end for *_, end in works]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "rows_q"),
    [
        ((0, 1), (0, 1), 1),
        ((0, 130, 130, 131, 500), (0, 64, 70, 300, 300), 500),
        ((0, 0, 0), (0, 10, 20), 0),
        ((0, 128, 256, 384), (0, 128, 256, 384), 1000),
        (tuple(range(0, 41 * 37, 37)), tuple(range(0, 41 * 50, 50)), 41 * 37),
    ],
)
def test_packed_rows_are_computed_once(
    host: Callable[..., list[Any]], cu_q: tuple[int, ...], cu_k: tuple[int, ...], rows_q: int
) -> None:
    """Of every sequence, and behind the last one, from the last queries on; other tiles see and store nothing."""
    tile_rows, tile_columns = tile_of_works(host)
    heads, batch, rows_k = 2, len(cu_q) - 1, cu_k[-1] + 10
    (works,) = host([("works", batch, heads, rows_q, rows_k, -1, -1, 0, len(cu_q), *cu_q, len(cu_k), *cu_k)])
    first_queries = defaultdict(list)
    for index, head, first_query, stored, first_q, first_k, seqlen_q, seqlen_k, begin, end in works:
        if index == batch:
            assert (stored, first_q, seqlen_q, seqlen_k) == (rows_q - cu_q[-1], cu_q[-1], 0, 0)
        else:
            assert (stored, seqlen_q) == (cu_q[index + 1] - cu_q[index],) * 2
            assert seqlen_k == cu_k[index + 1] - cu_k[index]
            assert (first_q, first_k) == (cu_q[index], cu_k[index])
        if first_query >= seqlen_q or seqlen_k == 0:
            assert begin >= end
        else:
            assert (begin, end) == (0, -(-seqlen_k // tile_columns))
        if first_query < stored:
            first_queries[index, head].append((first_query, stored))
    stored_rows = [end - begin for begin, end in itertools.pairwise((*cu_q, rows_q))]
    for head in range(heads):
        for index, stored in enumerate(stored_rows):
            expected = [(first, stored) for first in range(0, stored, tile_rows)][::-1]
            assert first_queries.get((index, head), []) == expected


def test_cumulative_lengths_that_fall_lead_nowhere_outside(host: Callable[..., list[Any]]) -> None:
    """What is stored for each tile lies in the tensors, whatever the lengths say."""
    random.seed(0)
    tile_rows, _ = tile_of_works(host)
    rows, heads, requests = 2000, 1, []
    for _ in range(30):
        cu = [random.choice((0, 10, 20, rows, rows + 500, -7, random.randrange(rows))) for _ in range(6)]
        for lengths in ([0, rows, 10, 20, *cu], [*cu, rows, rows], [0, *cu] * 7):
            lists = (len(lengths), *lengths) * 2
            requests.append(("works", len(lengths) - 1, heads, rows, rows, -1, -1, 0, *lists))
    for works in host(requests):
        for _, _, first_query, stored, first_q, *_ in works:
            assert first_query >= 0 and first_q + min(first_query, stored) >= 0
            assert first_q + min(first_query + tile_rows, stored) <= rows


def test_sections_stay_in_the_cache_or_fill_the_device(host: Callable[..., list[Any]]) -> None:
    shapes = [
        (batch, heads, group, *head_dims, rows, keys)
        for batch, (heads, group) in itertools.product((1, 3, 64), ((1, 1), (16, 1), (16, 4), (40, 40)))
        for head_dims in ((64, 64), (128, 128), (192, 128), (256, 256))
        for rows, keys in ((1, 1), (100, 1000), (512, 512), (4096, 4096), (1000, 60_000), (131_072, 131_072))
    ]
    for causal, packed in itertools.product((False, True), repeat=2):
        windows = (-1, 0 if causal else -1, 0)
        answers = host(
            [("tile_order", *shape, *windows, int(packed), ROWS, MULTIPROCESSORS) for shape in shapes]
        )
        for shape, (matrices, ranks, section) in zip(shapes, answers, strict=True):
            batch, heads, group, head_dim, head_dim_v, rows, keys = shape
            assert matrices == (heads if packed else batch * heads)
            assert ranks == (rows // ROWS + batch + 1 if packed else -(-rows // ROWS))
            assert 1 <= section <= matrices
            if not causal and not packed:
                continue  # all tiles take equally long
            if keys <= FEW_ROWS and not packed:
                assert section * ranks >= min(MULTIPROCESSORS, matrices * ranks), shape
                continue
            length = min(keys, TYPICAL_ROWS) if packed else keys
            cached = -(-section // group) * length * (head_dim + head_dim_v) * 2
            assert cached <= CACHE_BYTES or section <= group, shape
            # And no shorter than that: one more group of heads does not fit.
            more = (section // group + 1) * length * (head_dim + head_dim_v) * 2
            assert more > CACHE_BYTES or section == matrices, shape


def test_nothing_to_compute_is_no_tile(host: Callable[..., list[Any]]) -> None:
    shapes = [(0, 4, 1, 64, 64, 100, 100), (2, 4, 1, 64, 64, 0, 100)]
    for matrices, ranks, _ in host(
        [("tile_order", *shape, -1, 0, 0, 0, ROWS, MULTIPROCESSORS) for shape in shapes]
    ):
        assert matrices * ranks == 0
