"""Where the Hopper forward has which element: shared memory, operands, accumulators and the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

UNTOUCHED = 0xFFFF


def swizzled(address: int) -> int:
    """CU_TENSOR_MAP_SWIZZLE_128B: bits 4 to 6 of a byte address change by bits 7 to 9."""
    return address ^ ((address >> 7 & 7) << 4)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (112, 96), (80, 256)])
def test_tiles_lie_as_the_copy_engine_writes_them(
    host: Callable[..., list[Any]], rows: int, columns: int
) -> None:
    (chunks,) = host([("chunks", rows, columns)])
    panels = -(-columns // 64)
    for row in range(rows):
        for chunk in range(8 * panels):
            # One box for each panel of 64 elements: its rows are 128 bytes and follow each other.
            assert chunks[row][chunk] == swizzled(chunk // 8 * rows * 128 + row * 128 + chunk % 8 * 16)
    addresses = sorted(address for row in chunks for address in row)
    assert addresses == list(range(0, rows * panels * 128, 16))  # each once
    for first in range(0, rows - 7, 4):
        for chunk in range(8 * panels):
            groups = {chunks[row][chunk] >> 4 & 7 for row in range(first, first + 8)}
            assert len(groups) == 8  # 8 rows at a time without bank conflicts


@pytest.mark.parametrize("address", [0, 1024, 0x38400])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_descriptors_have_the_fields_of_the_isa(
    host: Callable[..., list[Any]], address: int, transposed: bool
) -> None:
    ((high, low),) = host([("descriptor", address, int(transposed))])
    bits = high << 32 | low
    assert bits & 0x3FFF == address >> 4
    assert bits >> 32 & 0x3FFF == 8 * 128 >> 4  # from 8 rows to the next 8
    assert bits >> 62 == 1 and bits >> 49 & 7 == 0  # 128-byte swizzle, from an aligned base
    if transposed:  # from a panel of 64 columns to the next
        assert bits >> 16 & 0x3FFF == 96 * 128 >> 4


def accumulator(lane: int, j: int, e: int) -> tuple[int, int]:
    """Row and column of element e of fragment j. PTX ISA, accumulator of wgmma and of mma.m16n8k16."""
    return lane // 4 + 8 * (e // 2), 8 * j + 2 * (lane % 4) + e % 2


def operand_a(lane: int, word: int, half: int) -> tuple[int, int]:
    """Row and column of a 16 x 16 operand A. PTX ISA, mma.m16n8k16."""
    return lane // 4 + 8 * (word % 2), 2 * (lane % 4) + half + 8 * (word // 2)


def test_accumulators_become_operands(host: Callable[..., list[Any]]) -> None:
    (steps,) = host([("packed",)])
    for lane in range(32):
        for step, words in enumerate(steps):
            for word, halves in enumerate(words):
                for half, number in enumerate(halves):
                    row, column = accumulator(lane, number // 4, number % 4)
                    assert (row, column - 16 * step) == operand_a(lane, word, half)


def test_quads_are_transposed(host: Callable[..., list[Any]]) -> None:
    (lanes,) = host([("transposed",)])
    for lane, words in enumerate(lanes):
        quad, thread = lane // 4 * 4, lane % 4
        assert words == [4 * (quad + other) + thread for other in range(4)]


@pytest.mark.parametrize("head_dim", [64, 40, 8])
@pytest.mark.parametrize(
    ("first_row", "used", "stored"), [(0, 48, 48), (16, 20, 30), (32, 20, 48), (16, 5, 5)]
)
def test_rows_are_stored_where_they_belong(
    host: Callable[..., list[Any]], first_row: int, used: int, stored: int, head_dim: int
) -> None:
    (matrix,) = host([("stored", first_row, used, stored, head_dim)])
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            if first_row <= row < min(first_row + 16, stored) and column < head_dim:
                assert value == (64 * (row - first_row) + column if row < used else 0), (row, column)
            else:
                assert value == UNTOUCHED, (row, column)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_cursors_go_round_and_change_their_parity(host: Callable[..., list[Any]], stages: int) -> None:
    (places,) = host([("cursor", stages, 4 * stages + 1)])
    assert places == [[step % stages, step // stages % 2] for step in range(len(places))]
