"""Builds libflash_attn_kernels.so from beginning to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from build_support import ninja_file, ptxas
from build_support.architectures import requested_architectures
from build_support.errors import BuildError
from build_support.instantiations import instantiations
from build_support.platform_tag import platform_tag
from build_support.toolchain import Toolchain, find_toolchain

MEMORY_PER_JOB_BYTES = 3 * 2**30


@dataclass(frozen=True)
class BuiltLibrary:
    path: Path  # inside the package
    platform_tag: str
    report: Path  # JSON: seconds and memory per translation unit, sizes, kernels


def build(root: Path, *, clean: bool = False) -> BuiltLibrary:
    """Compiles what changed in `root` (the folder of pyproject.toml) and puts the library into the package.

    The library in the package is replaced only after every check passed. BuildError says what went wrong.
    """
    build_dir = root / "build"
    if clean:
        shutil.rmtree(build_dir, ignore_errors=True)
    toolchain = find_toolchain()
    architectures = requested_architectures()
    build_dir.mkdir(exist_ok=True)
    units = [
        *ninja_file.handwritten_units(root, build_dir),
        *ninja_file.write_generated_units(build_dir, instantiations()),
    ]
    ninja_file.link_toolchain(build_dir, toolchain)
    ninja_file.write_ninja_file(root, build_dir, units, architectures, toolchain.stamp)

    jobs = job_count()
    start = time.time()
    _run_ninja(toolchain, build_dir, jobs)
    seconds = time.time() - start

    records = {unit: json.loads(Path(build_dir, f"{unit.object}.json").read_text()) for unit in units}
    kernels = _check_kernels(build_dir, [record["output"] for record in records.values()])
    library = build_dir / ninja_file.LIBRARY
    tag = platform_tag(library)
    report = build_dir / "report.json"
    compiled = [unit for unit in units if Path(build_dir, f"{unit.object}.json").stat().st_mtime >= start]
    report.write_text(
        json.dumps(
            {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "cuda": toolchain.cuda_version,
                "torch": toolchain.torch_version,
                "architectures": [f"{a.number}{'+PTX' if a.ptx else ''}" for a in architectures],
                "jobs": jobs,
                "compiled_now": len(compiled),
                "wall_seconds": round(seconds, 1),
                "library_bytes": library.stat().st_size,
                "platform_tag": tag,
                "translation_units": [
                    {
                        "source": str(unit.source),
                        "seconds": record["seconds"],
                        "peak_memory_bytes": record["peak_memory_bytes"],
                    }
                    for unit, record in records.items()
                ],
                "kernels": [kernel.as_row() for kernel in kernels],
            },
            indent=1,
        )
        + "\n"
    )
    return BuiltLibrary(_install(library, root), tag, report)


def summary(report: Path) -> str:
    """Three lines about a build report."""
    data = json.loads(report.read_text())
    units = data["translation_units"]
    slowest = max(units, key=lambda unit: unit["seconds"])
    largest = max(units, key=lambda unit: unit["peak_memory_bytes"])
    return (
        f"{data['compiled_now']} of {len(units)} translation units compiled in {data['wall_seconds']} s with "
        f"{data['jobs']} jobs (CUDA {data['cuda']}, torch {data['torch']}, {';'.join(data['architectures'])})\n"
        f"slowest {slowest['seconds']} s ({slowest['source']}), largest "
        f"{largest['peak_memory_bytes'] / 2**30:.2f} GiB ({largest['source']}), all of them "
        f"{sum(unit['seconds'] for unit in units):.1f} s one after another\n"
        f"library {data['library_bytes'] / 1e6:.2f} MB, {len(data['kernels'])} kernels, {data['platform_tag']}"
    )


def job_count() -> int:
    """MAX_JOBS, or as many as there are cores, with 3 GiB of available memory for each."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS: got {wanted!r}, expected a whole number >= 1")
        return int(wanted)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, _available_memory_bytes() // MEMORY_PER_JOB_BYTES))


def _available_memory_bytes() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    limits = [int(found.group(1)) * 1024] if found else [MEMORY_PER_JOB_BYTES]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (limit := container.read_text().strip()).isdigit():
        limits.append(int(limit))
    return min(limits)


def _run_ninja(toolchain: Toolchain, build_dir: Path, jobs: int) -> None:
    # stdin must not be inherited: build front ends may hand the hook a closed one.
    finished = subprocess.run(
        [str(toolchain.ninja), "-C", str(build_dir), "-j", str(jobs)], stdin=subprocess.DEVNULL, check=False
    )
    if finished.returncode != 0:
        raise BuildError(
            f"compiling the CUDA kernels failed (ninja exit code {finished.returncode}); see above"
        )


def _check_kernels(build_dir: Path, outputs: list[str]) -> list[ptxas.Kernel]:
    mangled = [kernel for output in outputs for kernel in ptxas.parse_report(output)]
    readable = ptxas.demangle([kernel.name for kernel in mangled])
    kernels = [
        ptxas.Kernel(**{**kernel.as_row(), "name": name})
        for kernel, name in zip(mangled, readable, strict=True)
    ]
    kernel_table = build_dir / "kernels.txt"
    kernel_table.write_text(ptxas.table(kernels))
    warnings = [warning for output in outputs for warning in ptxas.fatal_warnings(output)]
    spills = [
        f"{kernel.name} for {kernel.architecture}: {kernel.spill_store_bytes} bytes stored, "
        f"{kernel.spill_load_bytes} loaded"
        for kernel in ptxas.forbidden_spills(kernels)
    ]
    if warnings or spills:
        parts = []
        if warnings:
            parts.append("ptxas warnings that mean a slow kernel:\n  " + "\n  ".join(warnings))
        if spills:
            parts.append("register spills:\n  " + "\n  ".join(spills))
        raise BuildError("\n".join(parts) + f"\nThe whole table is in {kernel_table}")
    return kernels


def _install(library: Path, root: Path) -> Path:
    """Copies the library into the package by an atomic rename: a running process may have the old one mapped."""
    target = root / "src" / "flash_attn_kernels" / "lib" / library.name
    target.parent.mkdir(exist_ok=True)
    if target.is_file() and target.read_bytes() == library.read_bytes():
        return target
    temporary = target.with_suffix(".new")
    shutil.copy2(library, temporary)
    temporary.replace(target)
    return target
