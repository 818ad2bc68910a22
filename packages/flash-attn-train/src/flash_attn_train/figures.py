"""Curves of a run as PNG files, each with its axes named and in units."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flash_attn_train.atomic import atomic_write

Rows = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Curve:
    """A column of the metrics over steps.

    Attributes:
        column: of metrics.csv.
        label: in the legend, which is drawn if there are several curves.
        factor: what the values are multiplied with.
        marked: each point is marked: for rare values.
    """

    column: str
    label: str = ""
    factor: float = 1.0
    marked: bool = False


@dataclass(frozen=True)
class Picture:
    """A diagram of some curves. ``title`` and ``unit`` say what is shown, the others how the vertical axis is."""

    file: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False
    from_zero: bool = False


LOSS = Picture(
    "loss.png",
    "Loss",
    "loss (nats per target)",
    (Curve("train/loss", "training (one step)"), Curve("val/loss", "validation", marked=True)),
)
PICTURES = (
    Picture("learning_rate.png", "Learning rate", "learning rate", (Curve("lr"),)),
    Picture(
        "grad_norm.png", "Gradient norm before clipping", "L2 norm", (Curve("grad_norm"),), logarithmic=True
    ),
    Picture(
        "accuracy.png",
        "Validation accuracy",
        "accuracy (%)",
        (Curve("val/accuracy", factor=100.0, marked=True),),
    ),
    Picture(
        "tokens_per_s.png",
        "Speed, all devices",
        "tokens per second",
        (Curve("tokens_per_s"),),
        from_zero=True,
    ),
    Picture(
        "samples_per_s.png",
        "Speed, all devices",
        "samples per second",
        (Curve("samples_per_s"),),
        from_zero=True,
    ),
    Picture(
        "mfu.png", "Model FLOPs utilisation", "MFU (% of peak)", (Curve("mfu", factor=100.0),), from_zero=True
    ),
    Picture(
        "data_wait.png",
        "Wait for data",
        "share of step time (%)",
        (Curve("data_wait", factor=100.0),),
        from_zero=True,
    ),
    Picture(
        "memory.png", "Peak memory per device", "memory (GiB)", (Curve("peak_memory_gib"),), from_zero=True
    ),
)


def draw(picture: Picture, rows: Rows, path: Path, *, title: str | None = None) -> bool:
    """Draws a picture over optimizer steps; False, and no file, if the rows have none of its curves."""
    curves = [curve for curve in picture.curves if any(curve.column in row for row in rows)]
    if not curves:
        return False
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        points = [(row["step"], row[curve.column] * curve.factor) for row in rows if curve.column in row]
        marker = "o" if curve.marked or len(points) == 1 else ""
        width = 2.0 if curve.marked or len(curves) == 1 else 1.0
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=width, label=curve.label)
    axes.set(title=title or picture.title, xlabel="optimizer step", ylabel=picture.unit)
    if picture.logarithmic and all(row[c.column] > 0 for c in curves for row in rows if c.column in row):
        axes.set_yscale("log")
    if picture.from_zero:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if len(picture.curves) > 1:
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with atomic_write(path) as file:
        file.write(image.getvalue())
    return True
