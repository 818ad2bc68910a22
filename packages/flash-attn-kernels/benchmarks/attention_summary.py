"""The summary of an attention run: geometric mean and worst cell of our speed against each contestant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from contestants import OURS, geometric_mean

PEERS = ("flash2", "cudnn")
BEST_PEER = "best peer"  # of each cell the faster one
DETERMINISTIC = "deterministic"  # ours
CASE = ("direction", "dtype", "head_dim", "causal", "seqlen")
SCOPES: dict[str, tuple[int, ...] | None] = {
    "d64-d128": (64, 128),
    "all": None,
}  # head dims; None is every one
Cell = dict[str, Any]


def summary(cells: Sequence[Cell]) -> list[Cell]:
    """By scope, direction, dtype and contestant, over all measured cells.

    For the deterministic backward the figure is the overhead of it: its time over that of the default.
    """
    compared = [cell for cell in cells if cell["contestant"] != OURS and cell["speedup_of_ours"] is not None]
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for scope, head_dims in SCOPES.items():
        for cell in [*compared, *best_peers(compared)]:
            if head_dims is None or cell["head_dim"] in head_dims:
                key = (scope, cell["direction"], cell["dtype"], cell["contestant"])
                groups.setdefault(key, []).append({**cell, "scope": scope})
    return [row for group in groups.values() for row in mean_and_worst(group)]


def best_peers(cells: Sequence[Cell]) -> list[Cell]:
    """Of each case the peer against which we fare worst, as a contestant of its own."""
    best: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        if cell["contestant"] in PEERS:
            case = tuple(cell[column] for column in CASE)
            best[case] = min(best.get(case, cell), cell, key=speedup)
    return [{**cell, "contestant": BEST_PEER} for cell in best.values()]


def mean_and_worst(group: Sequence[Cell]) -> list[Cell]:
    """Two rows, with the columns of a cell, for cells of one contestant."""
    worst_of = max if group[0]["contestant"] == DETERMINISTIC else min
    worst = {**worst_of(group, key=speedup), "kind": "summary"}
    worst |= {"tflops": None, "median_us": None, "p20_us": None, "p80_us": None}
    nowhere = {"head_dim": None, "causal": None, "seqlen": None}
    mean = round(geometric_mean([speedup(cell) for cell in group]), 3)
    return [
        {**worst, **nowhere, "statistic": "geometric mean", "speedup_of_ours": mean},
        {**worst, "statistic": "worst cell"},
    ]


def speedup(cell: Cell) -> float:
    return cell["speedup_of_ours"]
