"""The README's Python examples run, in order, as one program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_examples_run(tmp_path: Path, standard_library_cache: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    assert "train(config)" in program
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(standard_library_cache)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("runs/first/loss.png runs/first/checkpoints/last.ckpt")
