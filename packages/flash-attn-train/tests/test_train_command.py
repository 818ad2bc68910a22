"""Exit codes of commands."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from flash_attn_train.command import command
from flash_attn_train.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 5, ""),
        (ConfigError("model: got x"), 2, "flash-attn-x: error: model: got x\n"),
        (KeyboardInterrupt(), 130, "flash-attn-x: interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command("flash-attn-x")
    def main(number: int) -> int:
        if error is not None:
            raise error
        return number

    assert main(5) == code
    assert capsys.readouterr().err == message


def test_other_errors_are_seen() -> None:
    @command("flash-attn-x")
    def main() -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        main()


@pytest.mark.parametrize("name", ["cli", "cli_prepare", "evaluate", "export", "report"])
def test_all_commands(name: str) -> None:
    assert hasattr(importlib.import_module(f"flash_attn_train.{name}").main, "__wrapped__")


def test_self_test_has_help() -> None:
    command = [sys.executable, "-m", "flash_attn_train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m flash_attn_train") and "exit code is 0" in done.stdout
