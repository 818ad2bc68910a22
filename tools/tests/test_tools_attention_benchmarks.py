"""What of the attention benchmarks needs no GPU: their summaries, their options, how they pack and unpack."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from repository import packages

sys.path.insert(0, str(packages()[0].folder / "benchmarks"))

import attention_summary
import bench_attention_varlen
import contestants
import torch

RAGGED = {3: 4, 7: 2}


def cell(head_dim: int, contestant: str, speedup: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "cell",
        "scope": None,
        "statistic": "median",
        "direction": "forward",
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "causal": True,
        "seqlen": 1024,
        "contestant": contestant,
        "path": None,
        "tflops": 500.0,
        "median_us": 10.0,
        "p20_us": 9.0,
        "p80_us": 11.0,
        "speedup_of_ours": speedup,
    }
    assert set(changes) <= set(row)
    return {**row, **changes}


CELLS = [
    cell(64, "ours", 1.0),
    cell(64, "flash2", 2.0),
    cell(64, "cudnn", 1.0),
    cell(128, "ours", 1.0),
    cell(128, "flash2", 2.0),
    cell(128, "cudnn", 4.0),
    cell(256, "ours", 1.0),
    cell(256, "flash2", 0.5),
    cell(256, "cudnn", None),
]


def figures(rows: list[dict[str, Any]], statistic: str) -> dict[tuple[str, str], float]:
    return {
        (row["scope"], row["contestant"]): row["speedup_of_ours"]
        for row in rows
        if row["statistic"] == statistic
    }


def test_summary_by_scope_and_contestant() -> None:
    rows = attention_summary.summary(CELLS)
    assert figures(rows, "geometric mean") == {
        ("d64-d128", "flash2"): 2.0,
        ("d64-d128", "cudnn"): 2.0,
        ("d64-d128", "best peer"): 1.414,
        ("all", "flash2"): 1.26,
        ("all", "cudnn"): 2.0,
        ("all", "best peer"): 1.0,
    }
    assert figures(rows, "worst cell") == {
        ("d64-d128", "flash2"): 2.0,
        ("d64-d128", "cudnn"): 1.0,
        ("d64-d128", "best peer"): 1.0,
        ("all", "flash2"): 0.5,
        ("all", "cudnn"): 1.0,
        ("all", "best peer"): 0.5,
    }


def test_summary_rows_have_the_columns_of_a_cell_and_name_the_worst() -> None:
    rows = attention_summary.summary(CELLS)
    assert {tuple(row) for row in rows} == {tuple(CELLS[0])}
    assert {row["kind"] for row in rows} == {"summary"}
    assert {row["tflops"] for row in rows} == {None}
    worst = next(row for row in rows if row["scope"] == "all" and row["statistic"] == "worst cell")
    assert (worst["contestant"], worst["head_dim"], worst["seqlen"]) == ("flash2", 256, 1024)
    assert {row["head_dim"] for row in rows if row["statistic"] == "geometric mean"} == {None}


def test_summary_keeps_directions_and_dtypes_apart() -> None:
    cells = [
        cell(64, "cudnn", 2.0),
        cell(64, "cudnn", 3.0, dtype="float16"),
        cell(64, "cudnn", 4.0, direction="backward"),
    ]
    means = [
        (row["direction"], row["dtype"], row["speedup_of_ours"])
        for row in attention_summary.summary(cells)
        if (row["scope"], row["contestant"], row["statistic"]) == ("all", "best peer", "geometric mean")
    ]
    assert means == [
        ("forward", "bfloat16", 2.0),
        ("forward", "float16", 3.0),
        ("backward", "bfloat16", 4.0),
    ]


def test_worst_overhead_of_determinism_is_the_largest() -> None:
    cells = [cell(64, "deterministic", 1.1), cell(128, "deterministic", 1.3)]
    assert figures(attention_summary.summary(cells), "worst cell")["all", "deterministic"] == 1.3


@pytest.mark.parametrize(
    ("command_line", "directions"),
    [
        ([], ("forward", "backward")),
        (["--direction", "both"], ("forward", "backward")),
        (["--direction", "forward"], ("forward",)),
        (["--direction", "backward"], ("backward",)),
    ],
)
def test_direction_option(command_line: list[str], directions: tuple[str, ...]) -> None:
    arguments = contestants.parse_arguments(
        "attention", "", by_direction=True, full_help=None, command_line=command_line
    )
    assert arguments.directions == directions


def test_dense_results_return_to_the_packed_order() -> None:
    """Splitting two packed tensors by length and merging what two dense calls gave restores them."""
    lengths = bench_attention_varlen.random_lengths(RAGGED)
    assert sorted(lengths.tolist()) == [3, 3, 3, 3, 7, 7]
    rows = bench_attention_varlen.rows_by_length(lengths, RAGGED)
    packed = torch.randn(2, 26, 1, 2).unbind()
    split = [bench_attention_varlen.split_by_length(x, rows, RAGGED) for x in packed]
    assert [tuple(x.shape) for x in split[0]] == [(4, 3, 1, 2), (2, 7, 1, 2)]
    by_call = [x for group in zip(*split, strict=True) for x in group]
    merged = bench_attention_varlen.merge_lengths(by_call, len(RAGGED), torch.argsort(rows))
    assert all(map(torch.equal, merged, packed))


@pytest.mark.parametrize("lengths", [*bench_attention_varlen.EQUAL])
def test_equal_lengths_need_no_rearrangement(lengths: dict[int, int]) -> None:
    rows = bench_attention_varlen.rows_by_length(bench_attention_varlen.random_lengths(lengths), lengths)
    assert torch.equal(rows, torch.arange(16384))
