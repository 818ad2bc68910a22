"""Pictures of a cross table: bars, or lines over a column of numbers in one panel for each case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from benchmark_results import Result
from benchmark_view import Table, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    width: float = 1.4


@dataclass(frozen=True)
class Quantity:
    """How a value column is written, and which ceiling of the run bounds it."""

    name: str
    ceiling: str
    ceiling_name: str


# The same contestant looks the same in every picture. Colours that colour-blind eyes tell apart (Okabe and Ito).
STYLES = {
    "ours": Style("#d55e00", "o", 2.2),
    "deterministic": Style("#e69f00", "o"),
    "dense": Style("#e69f00", "D"),
    "cudnn": Style("#0072b2", "s"),
    "flash2": Style("#009e73", "^"),
    "efficient": Style("#cc79a7", "v"),
}
TITLE_WIDTH = 20  # characters over a panel
OTHER_STYLES = (Style("#56b4e9", "P"), Style("#000000", "X"), Style("#8c6d31", "*"), Style("#7f7f7f", "d"))
QUANTITIES = {
    "tflops": Quantity("TFLOP/s", "gemm_tflops", "matrix product, 8192³"),
    "gbps": Quantity("GB/s", "copy_gbps", "device copy"),
}


def plot(result: Result, content: Table, view: View, path: Path) -> None:
    """Draws the cross table as the view says, as PNG."""
    figure = line_figure(result, content, view) if view.x else bar_figure(content, view)
    figure.suptitle(", ".join([result.benchmark, *(value for _, value in view.where), result.gpu or "CPU"]))
    figure.savefig(path, dpi=160, metadata={"Software": None})  # without the version, which would be a change


def bar_figure(content: Table, view: View) -> Figure:
    """A group of bars for each line of the table, a bar for each of its columns."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    styles = styles_of(content.header[content.label_count :])
    labels = [", ".join(map(label, view.rows, line)) for line in content.lines]
    thickness = 0.8 / len(styles)
    figure = Figure(figsize=(8, 1 + 0.2 * len(labels) * len(styles)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, style) in enumerate(styles.items()):
        positions = [row + index * thickness for row in range(len(labels))]
        lengths = [line[content.label_count + index] or 0.0 for line in content.lines]
        axes.barh(positions, lengths, thickness, label=name, color=style.color)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(quantity_name(view))
    axes.legend()
    return figure


def line_figure(result: Result, content: Table, view: View) -> Figure:
    """Lines over the x column. Panels share both axes: the first `rows` column runs across, the others down."""
    from matplotlib.figure import Figure

    x_index = len(view.rows)
    across = list(dict.fromkeys(line[0] for line in content.lines))
    down = list(dict.fromkeys(tuple(line[1:x_index]) for line in content.lines))
    figure = Figure(figsize=(1 + 2 * len(across), 1.1 + 2 * len(down)), layout="constrained")
    panels = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for row, lower in zip(panels, down, strict=True):
        for axes, first in zip(row, across, strict=True):
            lines = [line for line in content.lines if line[:x_index] == [first, *lower]]
            draw_panel(axes, result, view, content, lines)
        names = ", ".join(map(label, view.rows[1:], lower))
        row[0].set_ylabel(f"{names}\n{quantity_name(view)}".strip())
    for axes, first in zip(panels[0], across, strict=True):
        axes.set_title(fill(label(view.rows[0], first), TITLE_WIDTH), fontsize=10)
    mark_numbers(panels[0, 0], sorted({line[x_index] for line in content.lines}))
    panels[0, 0].set_ylim(bottom=0)
    for axes in panels[-1]:
        axes.set_xlabel(view.x.replace("_", " "), fontsize=8)
    handles, series = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, series, loc="outside lower center", ncols=len(series), frameon=False)
    return figure


def draw_panel(axes: Axes, result: Result, view: View, content: Table, lines: Sequence[list[Any]]) -> None:
    """One line for each series of these lines of the table, and the run's ceiling."""
    x_index = len(view.rows)
    for index, (name, style) in enumerate(styles_of(content.header[content.label_count :]).items()):
        points = [(line[x_index], line[content.label_count + index]) for line in lines]
        measured = [point for point in points if point[1] is not None]
        axes.plot(
            [x for x, _ in measured],
            [y for _, y in measured],
            label=name,
            color=style.color,
            marker=style.marker,
            markersize=4,
            linewidth=style.width,
            zorder=2 + style.width,
        )
    quantity = QUANTITIES.get(view.value)
    if quantity and quantity.ceiling in result.ceilings:
        ceiling = result.ceilings[quantity.ceiling]
        axes.axhline(ceiling, label=quantity.ceiling_name, color="#555555", linestyle="--", linewidth=1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def mark_numbers(axes: Axes, numbers: Sequence[float]) -> None:
    """A logarithmic x axis with a tick at each of the numbers and nowhere else."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [short(number) for number in numbers])
    axes.minorticks_off()


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    others = [name for name in names if name not in STYLES]
    return {
        name: STYLES[name] if name in STYLES else OTHER_STYLES[others.index(name) % len(OTHER_STYLES)]
        for name in names
    }


def label(column: str, value: Any) -> str:
    """What a case is, in words: "head dim 64", "causal", "not causal"; texts speak for themselves: "forward"."""
    if isinstance(value, str):
        return value
    name = column.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value}"


def short(number: float) -> str:
    """2048 as 2k, as sequence lengths are written."""
    return f"{number // 1024:g}k" if number and number % 1024 == 0 else f"{number:g}"


def quantity_name(view: View) -> str:
    quantity = QUANTITIES.get(view.value)
    return quantity.name if quantity else view.value.replace("_", " ")
