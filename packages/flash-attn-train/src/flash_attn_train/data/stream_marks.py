"""Places in a stream that a run has passed, so that a later one need not read up to them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A mark is some kilobytes; reading so many windows again takes seconds.
_WINDOWS_BETWEEN = 4096


@dataclass(frozen=True)
class Mark:
    """A place between two documents of a rank's stream.

    Attributes:
        windows: complete windows before it.
        documents: training documents read before it, of all ranks.
        state: of the dataset (``IterableDataset.state_dict``); None for its beginning.
        tokens: left over: from the first that is not the start of a complete window.
    """

    windows: int
    documents: int
    state: Any
    tokens: list[int]


class StreamMarks:
    """Marks in a file of JSON lines, which several runs can write at once: they write the same.

    The file only saves time. If it cannot be written, nothing is remembered; a line that was not written whole is
    passed over.
    """

    def __init__(self, path: Path, *, windows_between: int = _WINDOWS_BETWEEN) -> None:
        self.path, self.windows_between = path, windows_between
        marks = self._read()
        self._last = marks[-1].windows if marks else 0

    def before(self, number: int) -> Mark | None:
        """The last mark that is not behind the start of window ``number``."""
        passed = [mark for mark in self._read() if mark.windows <= number]
        return max(passed, key=lambda mark: mark.windows, default=None)

    def add(self, mark: Mark) -> None:
        """Remembers the mark if the last one is far enough back."""
        if mark.windows - self._last < self.windows_between:
            return
        self._last = mark.windows
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(b"\n" + json.dumps(asdict(mark)).encode() + b"\n")

    def _read(self) -> list[Mark]:
        marks: list[Mark] = []
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    marks.append(Mark(**json.loads(line)))
        return marks
