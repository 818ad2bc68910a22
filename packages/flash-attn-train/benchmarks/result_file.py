"""What the benchmarks of training share: a result that grows case by case and outlives a run that is cut off."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flash_attn_models.testing import measure_ceilings, write_result
from flash_attn_train.atomic import atomic_write

Row = dict[str, Any]


class ResultFile:
    """Rows, written anew after every case; a case that fails is kept with its message, and the others go on.

    Beside what every benchmark's result has, the file holds ``failures``, a case and a message each, and ``resumed``,
    date and ceilings of each later run that added to it.

    Args:
        path: of the JSON.
        benchmark: its name.
        on_gpu: whether it measures; else it is tried out on a CPU, and no GPU is named.
        resume: a result of an earlier run, whose rows are kept; failed cases are not.

    Raises:
        ValueError: ``resume`` holds another benchmark, or was measured on another GPU or with other versions.
    """

    def __init__(
        self, path: str | Path, benchmark: str, *, on_gpu: bool, resume: str | Path | None = None
    ) -> None:
        self.path, self.benchmark, self.on_gpu = Path(path), benchmark, on_gpu
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        self.resumed: list[Row] = []
        self.ceilings: dict[str, float] = measure_ceilings() if on_gpu else {}
        free_device_memory()  # what the ceilings took
        self._first: Row = {}  # what a resumed result keeps of the run that began it
        if resume is not None:
            self._continue(Path(resume))
        print(f"ceilings: {self.ceilings}", flush=True)

    @classmethod
    def of_arguments(cls, benchmark: str, arguments: argparse.Namespace) -> ResultFile:
        """From the options that :func:`add_options` adds."""
        return cls(arguments.json, benchmark, on_gpu=not arguments.smoke, resume=arguments.resume)

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0

    def rows_of(self, case: Mapping[str, Any]) -> list[Row]:
        """Those that have all the values of ``case``."""
        return [row for row in self.rows if case.items() <= row.items()]

    def put(self, case: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Puts rows in the place of those of ``case``, behind the others, and writes the file.

        All get the columns of the new ones: those of an earlier version of the benchmark may lack some.
        """
        columns = list(rows[0]) if rows else []
        kept = [row for row in self.rows if not case.items() <= row.items()]
        self.rows = [{name: row.get(name) for name in columns or row} for row in kept] + list(rows)
        for row in rows:
            print("  ".join(str(value) for value in row.values()), flush=True)
        self._write()

    @contextlib.contextmanager
    def attempt(self, case: Mapping[str, Any]) -> Iterator[None]:
        """A case that may fail: its error is kept and written, and ends here."""
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            # The frames of the error hold what was on the GPU.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            self.failures.append({"case": dict(case), "message": message[:4000]})
            print(f"failed: {dict(case)}: {message}", flush=True)
            self._write()

    def _continue(self, path: Path) -> None:
        old = json.loads(path.read_text())
        now = self._content()
        for field in ("benchmark", "gpu", "versions"):
            if old[field] != now[field]:
                raise ValueError(
                    f"resume: got {path} with {field} {old[field]!r}, expected {now[field]!r}, that of this run; leave "
                    "resume out to measure everything again"
                )
        self.rows = old["rows"]
        self.resumed = [*old.get("resumed", []), {"date": now["date"], "ceilings": self.ceilings}]
        self._first = {"date": old["date"], "ceilings": old["ceilings"]}
        self._write()  # also where nothing is left to measure

    def _content(self) -> Row:
        draft = self.path.with_name(f"{self.path.name}.draft")
        with (
            contextlib.nullcontext()
            if self.on_gpu
            else mock.patch("torch.cuda.get_device_name", lambda: None)
        ):
            write_result(draft, self.benchmark, self.rows, self.ceilings)
        content = json.loads(draft.read_text())
        draft.unlink()
        return {**content, **self._first, "failures": self.failures, "resumed": self.resumed}

    def _write(self) -> None:
        with atomic_write(self.path) as file:
            file.write(json.dumps(self._content(), indent=1).encode() + b"\n")


def add_options(parser: argparse.ArgumentParser, default_json: str) -> None:
    """The options that every benchmark of training has."""
    parser.add_argument("--json", default=default_json, help="result file (default: %(default)s)")
    parser.add_argument(
        "--resume", metavar="JSON", help="keep the rows of this result, measure what it lacks"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: shows that it runs")


def free_device_memory() -> None:
    """Gives back what nothing refers to any more; without a GPU there is nothing to give back."""
    if torch.cuda.is_available():
        gc.collect()  # models are in cycles
        torch.cuda.empty_cache()
