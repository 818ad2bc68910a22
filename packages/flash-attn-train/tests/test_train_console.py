"""What is printed where."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios

import pytest
from flash_attn_train.console import duration, is_terminal, with_progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (36_061, "10:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("lines", "expected"), [(40, True), (0, False)])
def test_pseudo_terminal_without_size_is_none(
    monkeypatch: pytest.MonkeyPatch, lines: int, expected: bool
) -> None:
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 80, 0, 0))
    with os.fdopen(controller, "rb"), os.fdopen(terminal, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        found = is_terminal()
        monkeypatch.undo()
    assert found == expected


def test_progress_passes_items_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(iter("abc"), title="spelling", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "spelling ...\n"
