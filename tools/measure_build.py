"""Measures what a build of the kernels wheel costs: everything compiled once, from nothing.

    python tools/measure_build.py [--json packages/flash-attn-kernels/benchmarks/results/build.json]

Builds the wheel with the hook, as a user's `pip install` from source does, and writes one benchmark result:
seconds, the slowest translation unit, the most memory that one compiler took, sizes of library and wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from kernels_build import KERNELS
from repository import ROOT

DEFAULT_RESULT = KERNELS.folder / "benchmarks" / "results" / "build.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=DEFAULT_RESULT)
    arguments = parser.parse_args()
    shutil.rmtree(KERNELS.folder / "build", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, str(KERNELS.folder)],
            env=dict(
                os.environ,
                FLASH_ATTN_KERNELS_BUILD="always",
                PIP_CONSTRAINT=str(ROOT / "constraints.txt"),
                PIP_BUILD_CONSTRAINT=str(ROOT / "constraints.txt"),
            ),
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        result = build_result(json.loads((KERNELS.folder / "build" / "report.json").read_text()), wheel)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{arguments.json}: {json.dumps(result['rows'][0])}")
    return 0


def build_result(report: dict, wheel: Path) -> dict:
    units = report["units"]
    return {
        "benchmark": "build",
        "gpu": None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"cuda": report["cuda"], "torch": report["torch"], "python": platform.python_version()},
        "ceilings": {},
        "rows": [
            {
                "jobs": report["jobs"],
                "architectures": ";".join(report["architectures"]),
                "translation_units": len(units),
                "kernels": len(report["kernels"]),
                "build_s": report["wall_seconds"],
                "slowest_unit_s": max(unit["seconds"] for unit in units),
                "largest_compiler_gib": round(max(unit["peak_memory_bytes"] for unit in units) / 2**30, 2),
                "library_mb": round(report["library_bytes"] / 1e6, 2),
                "wheel_mb": round(wheel.stat().st_size / 1e6, 2),
            }
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
