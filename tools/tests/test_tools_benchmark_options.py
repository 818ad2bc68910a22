"""Every benchmark of every package can be imported without a GPU, and has the options that the GPU report gives."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch._functorch.config
from repository import ROOT, packages

PROGRAMS = [
    program for package in packages() for program in sorted(package.folder.glob("benchmarks/bench_*.py"))
]


def test_there_are_benchmarks_of_every_package() -> None:
    assert {program.parents[1] for program in PROGRAMS} == {package.folder for package in packages()}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: str(program.relative_to(ROOT / "packages")))
def test_help(program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(program.parent))  # they share modules beside them
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    # Some set it for all that they compile; other tests must not see that.
    with torch._functorch.config.patch(donated_buffer=True), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--quick" in text
