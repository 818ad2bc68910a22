"""Renders benchmark results into the READMEs.

    python tools/render_benchmarks.py [--check] [--plots]

Every figure comes from a file packages/*/benchmarks/results/NAME.json. A README shows it between the lines
`<!-- benchmark:NAME -->` and `<!-- /benchmark -->`, which this tool fills: where and when it was measured,
the ceilings of the same run, the table. --check changes nothing and fails when a README differs from what the
results say, or a result is shown nowhere. --plots also draws results/NAME.png with matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmark_results import Result, ResultError, read_result
from repository import ROOT, packages

BLOCK = re.compile(
    r"(?P<begin><!-- benchmark:(?P<name>[\w-]+) -->\n).*?(?P<end><!-- /benchmark -->)", re.DOTALL
)
SPEED_COLUMN = re.compile(r"(tflops|gbps|tokens_per_s)$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a README differs; change nothing")
    parser.add_argument("--plots", action="store_true", help="draw a picture beside each result")
    arguments = parser.parse_args()
    try:
        results = read_results(ROOT)
        problems = render(
            ROOT, {name: result for name, (_, result) in results.items()}, write=not arguments.check
        )
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.plots:
        for path, result in results.values():
            plot(result, path.with_suffix(".png"))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def read_results(root: Path) -> dict[str, tuple[Path, Result]]:
    """Results by the name of their file, which is the name of the benchmark."""
    results: dict[str, tuple[Path, Result]] = {}
    for path in sorted(root.glob("packages/*/benchmarks/results/*.json")):
        result = read_result(path)
        if result.benchmark != path.stem or path.stem in results:
            raise ResultError(f"{path}: benchmark: got {result.benchmark!r}, expected a unique {path.stem!r}")
        results[path.stem] = (path, result)
    return results


def render(root: Path, results: dict[str, Result], *, write: bool) -> list[str]:
    """Fills the READMEs, or with write=False only compares; returns what is wrong."""
    problems: list[str] = []
    shown: set[str] = set()
    for readme in (root / "README.md", *(package.folder / "README.md" for package in packages(root))):
        text = readme.read_text()
        names = [block["name"] for block in BLOCK.finditer(text)]
        shown.update(names)
        unknown = [name for name in names if name not in results]
        problems += [f"{readme}: no results/{name}.json for the block benchmark:{name}" for name in unknown]
        if text.count("<!-- benchmark:") != len(names):
            problems.append(f"{readme}: a benchmark block is not closed by <!-- /benchmark -->")
        if unknown:
            continue
        new = BLOCK.sub(lambda block: block["begin"] + markdown(results[block["name"]]) + block["end"], text)
        if new == text:
            continue
        if write:
            readme.write_text(new)
            print(f"{readme}: rendered")
        else:
            problems.append(f"{readme}: differs from the results: run tools/render_benchmarks.py")
    problems += [f"results/{name}.json is shown in no README" for name in sorted(set(results) - shown)]
    return problems


def markdown(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    measured = f"Measured {result.date[:10]} on {result.gpu or 'a CPU'} ({versions})."
    if result.ceilings:
        gemm, copy = result.ceilings["gemm_tflops"], result.ceilings["copy_gbps"]
        measured += (
            f" The same run's ceilings: 8192×8192×8192 bf16 matrix product {number(gemm)} TFLOP/s, "
            f"device copy {number(copy)} GB/s."
        )
    header = "| " + " | ".join(column.replace("_", " ") for column in result.columns) + " |"
    ruler = (
        "|" + "|".join(" ---: " if is_numeric(result, column) else " --- " for column in result.columns) + "|"
    )
    body = ["| " + " | ".join(number(value) for value in row.values()) + " |" for row in result.rows]
    return "\n".join([measured, "", header, ruler, *body, ""])


def number(value: Any) -> str:
    """Measured numbers with three significant digits, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def is_numeric(result: Result, column: str) -> bool:
    values = [row[column] for row in result.rows if row[column] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def plot(result: Result, path: Path) -> None:
    """One group of bars per row, one bar per speed column; nothing where a result has no speeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = [column for column in result.columns if SPEED_COLUMN.search(column)]
    if not speeds:
        return
    described_by = [column for column in result.columns if not isinstance(result.rows[0][column], float)]
    labels = [" ".join(str(row[column]) for column in described_by) for row in result.rows]
    height = 0.8 / len(speeds)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.18 * len(labels) * len(speeds)), layout="constrained")
    for index, column in enumerate(speeds):
        positions = [row + index * height for row in range(len(labels))]
        axes.barh(
            positions, [row[column] or 0.0 for row in result.rows], height, label=column.replace("_", " ")
        )
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_title(f"{result.benchmark}, {result.gpu}, {result.date[:10]}")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
