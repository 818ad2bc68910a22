"""Runs one nvcc command for ninja and records what it cost.

    python compile_one.py --object X.o --inside FOLDER [--inside FOLDER] --stamp TEXT -- nvcc ...

Writes X.o.json with the wall seconds, the peak memory of the largest compiler process (bytes) and nvcc's
output, which holds the ptxas report. Rewrites the dependency file X.o.d to the files inside the given
folders: torch and the toolkit are covered by the stamp, and their paths differ from one isolated build
environment to the next. Imports nothing of build_support, since ninja runs it as a script.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--object", type=Path, required=True)
    parser.add_argument("--inside", action="append", required=True)
    parser.add_argument("--stamp", required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    depfile = Path(f"{arguments.object}.d")

    start = time.perf_counter()
    compiler = subprocess.run(
        [*arguments.command, "-MD", "-MF", str(depfile), "-o", str(arguments.object)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if compiler.returncode != 0:
        sys.stdout.write(compiler.stdout)
        return compiler.returncode

    keep_inside(depfile, arguments.inside)
    record = {
        "seconds": round(seconds, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "stamp": arguments.stamp,
        "output": compiler.stdout,
    }
    Path(f"{arguments.object}.json").write_text(json.dumps(record, indent=1))
    return 0


def keep_inside(depfile: Path, folders: list[str]) -> None:
    """Drops from a make-style dependency file every prerequisite that is outside `folders`."""
    target, _, prerequisites = depfile.read_text().partition(":")
    files = prerequisites.replace("\\\n", " ").split()
    roots = [os.path.normpath(folder) + os.sep for folder in folders]
    kept = [file for file in files if os.path.normpath(file).startswith(tuple(roots))]
    depfile.write_text(f"{target}: {' '.join(kept)}\n")


if __name__ == "__main__":
    sys.exit(main())
