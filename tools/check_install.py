"""Proves that built wheels install and work, in clean environments outside the checkout.

    python tools/check_install.py dist [--only kernels|models|train]

For each of the three ways people install (flash-attn-kernels; flash-attn-models; flash-attn-train): a new
virtual environment in a temporary folder, `pip install` of that one package with its wheels in `dist`,
`pip check`, and the self-test `python -m flash_attn_X` of every layer that came along. Third-party packages
come from the package index under the repository's constraints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from repository import LAYERS, ROOT, Package, version

INSTALLED_ALONE = ("kernels", "models", "train")
# Variables that would let the checkout or the calling environment into the clean one.
FOREIGN_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX"}


class InstallError(RuntimeError):
    """An install that does not work; the message holds the failing command's output."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path, help="the folder with the four wheels")
    parser.add_argument("--only", action="append", choices=INSTALLED_ALONE, help="may be given several times")
    arguments = parser.parse_args()
    for layer in arguments.only or INSTALLED_ALONE:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix=f"install-{layer}-") as folder:
                installed = check_install(Package(layer), arguments.dist.resolve(), Path(folder))
        except InstallError as error:
            print(f"FAILED  flash-attn-{layer}: {error}")
            return 1
        seconds = time.monotonic() - start
        print(f"ok      flash-attn-{layer} ({seconds:.0f} s): {', '.join(installed)}", flush=True)
    return 0


def check_install(package: Package, dist: Path, folder: Path) -> list[str]:
    """Installs `package` under `folder`; returns the layers that came along and passed their self-test."""
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN_VARIABLES}
    constraints = str(ROOT / "constraints.txt")

    def run(*command: str) -> str:
        # In `folder`, not in the checkout, whose source folders must not be importable.
        finished = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if finished.returncode != 0:
            raise InstallError(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")
        return finished.stdout

    run(sys.executable, "-m", "venv", "venv")
    python = str(folder / "venv" / "bin" / "python")
    requirement = f"{package.distribution}=={version()}"
    pip_install = (
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--report",
        "report.json",
        "--constraint",
        constraints,
    )
    run(*pip_install, "--find-links", str(dist), requirement)

    expected = LAYERS[: LAYERS.index(package.layer) + 1]
    report = json.loads((folder / "report.json").read_text())
    sources = {item["metadata"]["name"]: item["download_info"]["url"] for item in report["install"]}
    ours = {name: url for name, url in sources.items() if name in {f"flash-attn-{layer}" for layer in LAYERS}}
    if set(ours) != {f"flash-attn-{layer}" for layer in expected}:
        raise InstallError(f"installed {sorted(ours)}, expected the layers {expected}")
    if strangers := [url for url in ours.values() if not url.startswith(dist.as_uri())]:
        raise InstallError(f"installed {strangers}, which are not the wheels in {dist}")

    run(python, "-m", "pip", "check")
    for layer in expected:
        run(python, "-m", f"flash_attn_{layer}")
    if package.layer == "train":
        run(str(folder / "venv" / "bin" / "flash-attn-train"), "--help")
    return [f"flash_attn_{layer}" for layer in expected]


if __name__ == "__main__":
    sys.exit(main())
