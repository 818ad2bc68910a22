"""Renders benchmark results into the READMEs.

    python tools/render_benchmarks.py [--check]

Every figure comes from a file packages/*/benchmarks/results/NAME.json. A README shows it between the lines
`<!-- benchmark:NAME -->` and `<!-- /benchmark -->`, which this tool fills: where and when it was measured,
the ceilings of the same run, the table or picture. benchmark_view.py describes the options that the first line
may hold.
--check changes nothing and fails when a README differs from the results, or a result is shown nowhere.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark_plot import plot
from benchmark_results import Result, ResultError, read_result
from benchmark_view import Table, parse_view, table
from repository import ROOT, packages

BLOCK = re.compile(
    r"(?P<begin><!-- benchmark:(?P<name>[\w-]+)(?P<options>[^>]*?)-->\n).*?(?P<end><!-- /benchmark -->)",
    re.DOTALL,
)
NOT_MEASURED = "Not measured yet.\n"


@dataclass(frozen=True)
class ResultFile:
    path: Path
    result: Result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a README differs; change nothing")
    arguments = parser.parse_args()
    try:
        problems = render(ROOT, read_results(ROOT), write=not arguments.check)
    except ResultError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def read_results(root: Path) -> dict[str, ResultFile]:
    """Results by the name of their file, which is the name of the benchmark."""
    results: dict[str, ResultFile] = {}
    for path in sorted(root.glob("packages/*/benchmarks/results/*.json")):
        result = read_result(path)
        if result.benchmark != path.stem or path.stem in results:
            raise ResultError(f"{path}: benchmark: got {result.benchmark!r}, expected a unique {path.stem!r}")
        results[path.stem] = ResultFile(path, result)
    return results


def render(root: Path, results: dict[str, ResultFile], *, write: bool) -> list[str]:
    """Fills the READMEs, or with write=False only compares; returns what is wrong.

    A block whose result does not exist, or has none of its rows (the benchmark has not run yet, or not all of
    it), says so.
    """
    problems: list[str] = []
    shown: set[str] = set()
    for readme in (root / "README.md", *(package.folder / "README.md" for package in packages(root))):
        text = readme.read_text()
        blocks = list(BLOCK.finditer(text))
        shown.update(block["name"] for block in blocks)
        if text.count("<!-- benchmark:") != len(blocks):
            problems.append(f"{readme}: a benchmark block is not closed by <!-- /benchmark -->")
        new, end = "", 0
        for block in blocks:
            new += text[end : block.start()]
            new += block["begin"]
            if block["name"] in results:
                new += _content(block, results[block["name"]], readme, write, problems)
            else:
                new += NOT_MEASURED
            new += block["end"]
            end = block.end()
        new += text[end:]
        if new != text and write:
            readme.write_text(new)
            print(f"{readme}: rendered")
        elif new != text:
            problems.append(f"{readme}: differs from the results: run tools/render_benchmarks.py")
    problems += [f"results/{name}.json is shown in no README" for name in sorted(set(results) - shown)]
    return problems


def _content(block: re.Match[str], file: ResultFile, readme: Path, write: bool, problems: list[str]) -> str:
    view = parse_view(block["options"])
    content = table(file.result, view)
    if content is None:
        print(f"{readme}: {block['name']}: nothing measured is {block['options'].strip()}")
        return NOT_MEASURED
    parts = [origin(file.result)]
    if not view.x:
        parts.append(markdown(content))
    if view.plot:
        picture = file.path.parent / view.plot
        if write:
            plot(file.result, content, view, picture)
        elif not picture.is_file():
            problems.append(f"{picture} is missing: run tools/render_benchmarks.py")
        over = f" over {view.x}" if view.x else ""
        text = f"{view.value}{over} of {file.result.benchmark}"
        parts.append(f"![{text}]({picture.relative_to(readme.parent)})\n")
    return "\n".join(parts)


def origin(result: Result) -> str:
    """Where and when it was measured, and the ceilings of the same run."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    measured = f"Measured {result.date[:10]} on {result.gpu or 'a CPU'} ({versions})."
    if result.ceilings:
        gemm, copy = result.ceilings["gemm_tflops"], result.ceilings["copy_gbps"]
        measured += (
            f" The same run's ceilings: 8192×8192×8192 bf16 matrix product {_text(gemm)} TFLOP/s, "
            f"device copy {_text(copy)} GB/s."
        )
    return measured + "\n"


def markdown(content: Table) -> str:
    header = "| " + " | ".join(name.replace("_", " ") for name in content.header) + " |"
    columns = list(zip(*content.lines, strict=True))
    ruler = "|" + "|".join(" ---: " if _is_numeric(column) else " --- " for column in columns) + "|"
    body = []
    for index, line in enumerate(content.lines):
        cells = [_text(value) for value in line]
        if content.notes:
            labels, values = cells[: content.label_count], cells[content.label_count :]
            cells = labels + [_with_note(*pair) for pair in zip(values, content.notes[index], strict=True)]
        body.append("| " + " | ".join(cells) + " |")
    return "\n".join([header, ruler, *body, ""])


def _text(value: Any) -> str:
    """Measured numbers with three significant digits, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _with_note(text: str, note: str | None) -> str:
    return text if note is None else f"{text} ({note})"


def _is_numeric(column: tuple[Any, ...]) -> bool:
    values = [value for value in column if value is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


if __name__ == "__main__":
    sys.exit(main())
