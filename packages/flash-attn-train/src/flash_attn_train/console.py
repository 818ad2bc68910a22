"""What a person sees: progress bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def is_terminal() -> bool:
    """Whether a progress bar can be drawn. Some pseudo-terminals have no size; no bar would show there."""
    return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).lines > 0


def say(text: str) -> None:
    """Prints a line at once, also into a pipe, and without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def with_progress(items: Iterable[T], *, title: str, total: int) -> Iterator[T]:
    """Passes the items on, with a progress bar on a terminal and one line at the start elsewhere."""
    if is_terminal():
        yield from tqdm(items, desc=title, total=total, file=sys.stdout, leave=False, dynamic_ncols=True)
    else:
        say(f"{title} ...")
        yield from items


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
