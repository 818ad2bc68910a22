"""Compiles the CUDA library into the checkout; only what changed since the last time.

    python tools/build_ext.py [--clean] [--fetch]

Needs torch, ninja, g++ and nvcc >= 13.0. With --fetch, ninja and nvcc come from the package index where they
are missing, into packages/flash-attn-kernels/build/fetched. Environment variables: FLASH_ATTN_KERNELS_ARCHS,
MAX_JOBS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys

import kernels_build
from build_support.errors import BuildError
from build_support.library import build
from build_support.toolchain import COMPILER_WHEELS, find_nvcc

FETCHED = kernels_build.KERNELS.folder / "build" / "fetched"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", action="store_true", help="compile everything again")
    parser.add_argument(
        "--fetch", action="store_true", help="install missing build tools into the build folder"
    )
    arguments = parser.parse_args()
    if arguments.clean:
        shutil.rmtree(FETCHED.parent, ignore_errors=True)
    try:
        if arguments.fetch:
            fetch_missing_tools()
        built = build(kernels_build.KERNELS.folder)
    except BuildError as error:
        hint = "" if arguments.fetch else "\n(--fetch gets missing build tools from the package index)"
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    print(built.report.summary())
    print(built.path)
    return 0


def fetch_missing_tools() -> None:
    """pip-installs what is missing beside the checkout's objects, not into the user's environment."""
    sys.path.append(str(FETCHED))
    os.environ["PATH"] += os.pathsep + str(FETCHED / "bin")
    missing = [] if shutil.which("ninja") else ["ninja"]
    missing += [] if find_nvcc() else COMPILER_WHEELS
    if not missing:
        return
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(FETCHED),
        *missing,
    ]
    if subprocess.run(install, check=False).returncode != 0:
        raise BuildError(
            f"could not install {', '.join(missing)}: install them, or a CUDA toolkit, by other means"
        )
    importlib.invalidate_caches()  # the folder may not have existed when its contents were first looked for


if __name__ == "__main__":
    sys.exit(main())
