"""The Python examples in the READMEs run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT, packages

SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
READMES = [ROOT / "README.md", *(package.folder / "README.md" for package in packages())]


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_python_examples_run(readme: Path, tmp_path: Path) -> None:
    """All blocks of one README in order, as one program: a later one may use what an earlier one made."""
    program = "\n".join(SNIPPET.findall(readme.read_text()))
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, f"{readme}:\n{program}\n{finished.stderr}"
