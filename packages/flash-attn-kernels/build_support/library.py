"""Builds libflash_attn_kernels.so from beginning to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from build_support import ninja_file, ptxas
from build_support.architectures import requested_architectures
from build_support.bounded_spins import bounded_spins_requested
from build_support.errors import BuildError
from build_support.instantiations import instantiations
from build_support.report import BuildReport, UnitCost
from build_support.toolchain import Toolchain, find_toolchain

MEMORY_PER_JOB_BYTES = 3 * 2**30


@dataclass(frozen=True)
class BuiltLibrary:
    path: Path  # inside the package
    report: BuildReport


def build(root: Path, *, clean: bool = False) -> BuiltLibrary:
    """Compiles what changed in `root` (the folder of pyproject.toml) and puts the library into the package.

    The library in the package is replaced only after every check passed. BuildError says what went wrong.
    """
    build_dir = root / "build"
    if clean:
        shutil.rmtree(build_dir, ignore_errors=True)
    toolchain = find_toolchain()
    architectures = requested_architectures()
    bounded_spins = bounded_spins_requested()
    build_dir.mkdir(exist_ok=True)
    units = [
        *ninja_file.handwritten_units(root, build_dir),
        *ninja_file.write_generated_units(build_dir, instantiations()),
    ]
    ninja_file.link_toolchain(build_dir, toolchain)
    ninja_file.write_ninja_file(
        root, build_dir, units, architectures, toolchain.stamp, bounded_spins=bounded_spins
    )

    jobs = job_count()
    start = time.time()
    _run_ninja(toolchain, build_dir, jobs)
    wall_seconds = round(time.time() - start, 1)

    record_files = [Path(build_dir, f"{unit.object}.json") for unit in units]
    records = [json.loads(file.read_text()) for file in record_files]
    library = build_dir / ninja_file.LIBRARY
    report = BuildReport(
        cuda=toolchain.cuda_version,
        torch=toolchain.torch_version,
        architectures=[str(architecture) for architecture in architectures],
        jobs=jobs,
        compiled_now=sum(file.stat().st_mtime >= start for file in record_files),
        wall_seconds=wall_seconds,
        library_bytes=library.stat().st_size,
        units=[
            UnitCost(str(unit.source), record["seconds"], record["peak_memory_bytes"])
            for unit, record in zip(units, records, strict=True)
        ],
        kernels=_check_kernels(
            build_dir, [record["output"] for record in records], spills_are_fatal=not bounded_spins
        ),
    )
    report.write(build_dir / "report.json")
    return BuiltLibrary(_install(library, root), report)


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
    command = [str(toolchain.ninja), "-C", str(build_dir), "-j", str(jobs)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if finished.returncode != 0:
        raise BuildError(f"compiling failed, see above (ninja exit code {finished.returncode})")


def _check_kernels(build_dir: Path, outputs: list[str], *, spills_are_fatal: bool) -> list[ptxas.Kernel]:
    mangled = [kernel for output in outputs for kernel in ptxas.parse_report(output)]
    readable = ptxas.demangle([kernel.name for kernel in mangled])
    kernels = [replace(kernel, name=name) for kernel, name in zip(mangled, readable, strict=True)]
    kernel_table = build_dir / "kernels.txt"
    kernel_table.write_text(ptxas.table(kernels))
    warnings = [warning for output in outputs for warning in ptxas.fatal_warnings(output)]
    spills = [
        f"{kernel.name} for {kernel.architecture}: {kernel.spill_store_bytes} bytes stored, "
        f"{kernel.spill_load_bytes} loaded"
        for kernel in ptxas.forbidden_spills(kernels)
    ]
    parts = []
    if warnings:
        parts.append("ptxas warnings that mean a slow kernel:\n  " + "\n  ".join(warnings))
    if spills:
        spilled = "register spills:\n  " + "\n  ".join(spills)
        if spills_are_fatal:
            parts.append(spilled)
        else:
            print(spilled, file=sys.stderr)
    if parts:
        raise BuildError("\n".join(parts) + f"\nThe whole table is in {kernel_table}")
    return kernels


def _install(library: Path, root: Path) -> Path:
    """Puts the library into the package by renaming: a running process may have the old one mapped."""
    target = root / "src" / "flash_attn_kernels" / "lib" / library.name
    target.parent.mkdir(exist_ok=True)
    if target.is_file() and target.read_bytes() == library.read_bytes():
        return target
    temporary = target.with_suffix(".new")
    shutil.copy2(library, temporary)
    temporary.replace(target)
    return target
