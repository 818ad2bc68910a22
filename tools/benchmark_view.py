"""One view of a benchmark result: which rows a README shows, and how, as its block says.

    <!-- benchmark:attention rows=head_dim,causal columns=seqlen value=tflops
         against=contestant:flash2,cudnn where=direction:forward,contestant:ours -->
    <!-- benchmark:attention rows=head_dim,causal x=seqlen columns=contestant value=tflops
         where=direction:forward plot=attention_forward.png -->

Without options all rows are shown with all columns. `where` keeps rows by a column's value (several conditions,
with commas between them); where it keeps none, nothing has been measured yet. `rows`, `columns` and `value` make
a cross table: one line for each combination of the `rows` columns, one column for each value of the `columns`
column. In parentheses a cell may hold one thing more: with `share` another column, in percent; with `against`
its value as a multiple of the largest one among rows that have one of the named values in the named column and
are otherwise of the same case (and that `where` would keep).
`plot` draws the cross table as bars into a picture beside the result. With `x` it draws lines over that column of
numbers instead, a panel for each combination of the `rows` columns, the first of them across; the picture then
stands in place of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark_results import Result, ResultError

OPTIONS = ("rows", "columns", "value", "x", "share", "against", "where", "plot")
CROSS = ("rows", "columns", "value")
Row = Mapping[str, Any]
Conditions = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rivals:
    """Rows with one of ``values`` in ``column``: what a cell is compared against."""

    column: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class View:
    rows: tuple[str, ...] = ()
    columns: str = ""
    value: str = ""
    x: str = ""
    share: str = ""
    against: Rivals | None = None
    where: tuple[tuple[str, str], ...] = ()
    plot: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that say what a line of the cross table is."""
        return (*self.rows, self.x) if self.x else self.rows


@dataclass(frozen=True)
class Table:
    header: list[str]
    lines: list[list[Any]]  # numbers, strings, or None for what was not measured
    notes: list[list[str | None]] | None = None  # beside the values of a cross table
    label_count: int = 0  # how many leading columns say what a line of a cross table is


def parse_view(text: str) -> View:
    """The options of one block; ResultError for an unknown or incomplete one."""
    options: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in OPTIONS or not equals or not value:
            raise ResultError(
                f"benchmark block: got {word!r}, expected one of {', '.join(OPTIONS)} as name=value"
            )
        options[name] = value
    if set(options) - {"where"} and not set(CROSS) <= set(options):
        raise ResultError(f"benchmark block: got {text.strip()!r}, expected rows, columns and value together")
    if "share" in options and "against" in options:
        raise ResultError(f"benchmark block: got {text.strip()!r}, expected one of share and against")
    if "x" in options and "plot" not in options:
        raise ResultError(f"benchmark block: got {text.strip()!r}, expected plot together with x")
    return View(
        rows=tuple(options["rows"].split(",")) if "rows" in options else (),
        columns=options.get("columns", ""),
        value=options.get("value", ""),
        x=options.get("x", ""),
        share=options.get("share", ""),
        against=_rivals(options["against"]) if "against" in options else None,
        where=tuple(_condition("where", word) for word in re.findall(r"[^,]+", options.get("where", ""))),
        plot=options.get("plot", ""),
    )


def table(result: Result, view: View) -> Table | None:
    """What the view shows of the result; None if no row fulfils `where`."""
    kept = _selected(result.rows, view.where)
    if not kept:
        return None
    against = view.against.column if view.against else ""
    for column in (*view.labels, view.columns, view.value, view.share, against):
        if column and column not in result.columns:
            raise ResultError(f"{result.benchmark}: got column {column!r}, expected one of {result.columns}")
    if not view.columns:
        return Table(header=result.columns, lines=[list(row.values()) for row in kept])
    return _cross_table(kept, view, result.benchmark, _note_of(result.rows, view))


def _selected(rows: Sequence[Row], conditions: Conditions) -> list[Row]:
    return [row for row in rows if all(str(row.get(column)) == value for column, value in conditions)]


def _cross_table(
    rows: Sequence[Row], view: View, benchmark: str, note_of: Callable[[Row], str | None] | None
) -> Table:
    series = list(dict.fromkeys(str(row[view.columns]) for row in rows))
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        line = cells.setdefault(tuple(row[column] for column in view.labels), {})
        name = str(row[view.columns])
        if name in line:
            raise ResultError(
                f"{benchmark}: two rows for {view.labels} and {name}: add a column to rows or where"
            )
        line[name] = row
    notes = None
    if note_of is not None:
        notes = [
            [note_of(line[name]) if name in line else None for name in series] for line in cells.values()
        ]
    return Table(
        header=[*view.labels, *series],
        lines=[
            [*key, *(line.get(name, {}).get(view.value) for name in series)] for key, line in cells.items()
        ],
        notes=notes,
        label_count=len(view.labels),
    )


def _note_of(rows: Sequence[Row], view: View) -> Callable[[Row], str | None] | None:
    """What a row's cell says in parentheses; None if the view has no such thing."""
    if view.share:
        return lambda row: None if row[view.share] is None else f"{row[view.share]:.0%}"
    if view.against:
        return _multiple_of_rivals(rows, view, view.against)
    return None


def _multiple_of_rivals(rows: Sequence[Row], view: View, rivals: Rivals) -> Callable[[Row], str | None]:
    case = [column for column in (*view.labels, view.columns) if column != rivals.column]
    conditions = [condition for condition in view.where if condition[0] != rivals.column]
    largest: dict[tuple[Any, ...], float] = {}
    for row in _selected(rows, conditions):
        if str(row[rivals.column]) in rivals.values and row[view.value] is not None:
            key = tuple(row[column] for column in case)
            largest[key] = max(row[view.value], largest.get(key, row[view.value]))

    def note(row: Row) -> str | None:
        rival = largest.get(tuple(row[column] for column in case))
        return None if not rival or row[view.value] is None else f"{row[view.value] / rival:.2f}×"

    return note


def _condition(option: str, text: str) -> tuple[str, str]:
    column, colon, value = text.partition(":")
    if not colon:
        raise ResultError(f"benchmark block: {option}: got {text!r}, expected column:value")
    return column, value


def _rivals(text: str) -> Rivals:
    column, values = _condition("against", text)
    return Rivals(column, tuple(values.split(",")))
