"""One view of a benchmark result: which rows a README shows, and how, as its block says.

    <!-- benchmark:attention rows=head_dim,causal,seqlen columns=contestant value=tflops
         share=share_of_gemm where=direction:forward plot=attention_forward.png -->

Without options all rows are shown with all columns. `where` keeps rows by a column's value (several, with
commas between them). `rows`, `columns` and `value` make a cross table: one line for each combination of
the `rows` columns, one column for each value of the `columns` column. `share` adds another column in percent
to each cell; `plot` draws the cross table into a picture beside the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmark_results import Result, ResultError

OPTIONS = ("rows", "columns", "value", "share", "where", "plot")


@dataclass(frozen=True)
class View:
    rows: tuple[str, ...] = ()
    columns: str = ""
    value: str = ""
    share: str = ""
    where: tuple[tuple[str, str], ...] = ()
    plot: str = ""


@dataclass(frozen=True)
class Table:
    header: list[str]
    lines: list[list[Any]]  # numbers, strings, or None for what was not measured
    shares: list[list[float | None]] | None = None  # beside the lines of a cross table
    label_count: int = 0  # how many leading columns say what a line of a cross table is


def parse_view(text: str) -> View:
    """The options of one block; ResultError for an unknown or incomplete one."""
    options = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in OPTIONS or not equals or not value:
            raise ResultError(
                f"benchmark block: got {word!r}, expected one of {', '.join(OPTIONS)} as name=value"
            )
        options[name] = value
    cross = [name for name in ("rows", "columns", "value") if name in options]
    if (cross or "share" in options or "plot" in options) and len(cross) < 3:
        raise ResultError(f"benchmark block: got {text.strip()!r}, expected rows, columns and value together")
    return View(
        rows=tuple(options.get("rows", "").split(",")) if cross else (),
        columns=options.get("columns", ""),
        value=options.get("value", ""),
        share=options.get("share", ""),
        where=tuple(_condition(condition) for condition in re.findall(r"[^,]+", options.get("where", ""))),
        plot=options.get("plot", ""),
    )


def table(result: Result, view: View) -> Table:
    for column in (*view.rows, view.columns, view.value, view.share, *(column for column, _ in view.where)):
        if column and column not in result.columns:
            raise ResultError(f"{result.benchmark}: got column {column!r}, expected one of {result.columns}")
    kept = [row for row in result.rows if all(str(row[column]) == value for column, value in view.where)]
    if not kept:
        raise ResultError(f"{result.benchmark}: no row has {view.where}")
    if not view.columns:
        return Table(header=result.columns, lines=[list(row.values()) for row in kept])
    return _cross_table(kept, view, result.benchmark)


def _cross_table(rows: list[dict[str, Any]], view: View, benchmark: str) -> Table:
    series = list(dict.fromkeys(str(row[view.columns]) for row in rows))
    cells: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        line = cells.setdefault(tuple(row[column] for column in view.rows), {})
        name = str(row[view.columns])
        if name in line:
            raise ResultError(
                f"{benchmark}: two rows for {view.rows} and {name}: add a column to rows or where"
            )
        line[name] = row
    return Table(
        header=[*view.rows, *series],
        lines=[
            [*key, *(line.get(name, {}).get(view.value) for name in series)] for key, line in cells.items()
        ],
        shares=[[line.get(name, {}).get(view.share) for name in series] for line in cells.values()]
        if view.share
        else None,
        label_count=len(view.rows),
    )


def _condition(text: str) -> tuple[str, str]:
    column, colon, value = text.partition(":")
    if not colon:
        raise ResultError(f"benchmark block: where: got {text!r}, expected column:value")
    return column, value
