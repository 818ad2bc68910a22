"""Reads `ptxas -v`: registers, shared memory and spills of every kernel, and what must fail the build."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

# wgmma serialised, registers not reallocated and their kin: the kernel is correct and several times slower.
_FATAL_WARNING = re.compile(r"^.*\bC75(?:0[4-9]|1[0-5])\b.*$", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class AllowedSpill:
    """Kernels that may spill a few registers per tile, never in a product's loop, because that measured faster."""

    pattern: str  # regular expression on the readable name
    max_bytes: int  # stored by a thread
    reason: str


ALLOWED_SPILLS = (
    AllowedSpill(
        r"sm80::forward_kernel<[^<]*ForwardConfig<64, 64, 128, 128, ",
        80,
        "350 TFLOP/s against 330 of the widest tile without spills (112 keys) on an H100, 8k tokens",
    ),
    AllowedSpill(
        r"sm80::forward_kernel<[^<]*ForwardConfig<(96, 96|128, 128|192, 128), 128, 64, ",
        4,
        "one register per tile of keys; recomputing it instead spilled 16 bytes",
    ),
    AllowedSpill(
        r"sm80::backward_kernel<",
        80,
        "all products scheduled to their whole depth: at head dim 128 5 % faster on an H200, 16k tokens, than the "
        "schedule that spills nothing; at 192 tiles of 96 keys 12 % faster on an H100 than the 64 that spill nothing",
    ),
)


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


def parse_report(output: str) -> list[Kernel]:
    """Every entry function in nvcc's output, in order, under its mangled name."""
    kernels = []
    entries = list(_ENTRY.finditer(output))
    for index, entry in enumerate(entries):
        end = entries[index + 1].start() if index + 1 < len(entries) else len(output)
        block = output[entry.end() : end]
        # The function's own properties come first; those of functions that it calls may follow.
        spills, used = _SPILLS.search(block), _USED.search(block)
        if spills is None or used is None:
            raise ValueError(f"ptxas reported nothing about {entry.group(1)}: {block[:300]!r}")
        shared = _STATIC_SHARED.search(block[used.start() :])
        kernels.append(
            Kernel(
                name=entry.group(1),
                architecture=entry.group(2),
                registers=int(used.group(1)),
                static_shared_bytes=int(shared.group(1)) if shared else 0,
                stack_bytes=int(spills.group(1)),
                spill_store_bytes=int(spills.group(2)),
                spill_load_bytes=int(spills.group(3)),
            )
        )
    return kernels


def fatal_warnings(output: str) -> list[str]:
    """ptxas warnings C7504 to C7515."""
    return [found.group(0).strip() for found in _FATAL_WARNING.finditer(output)]


def forbidden_spills(kernels: Iterable[Kernel]) -> list[Kernel]:
    return [
        kernel
        for kernel in kernels
        if kernel.spills and not any(_allows(allowed, kernel) for allowed in ALLOWED_SPILLS)
    ]


def _allows(allowed: AllowedSpill, kernel: Kernel) -> bool:
    stored = max(kernel.spill_store_bytes, kernel.spill_load_bytes)
    return re.search(allowed.pattern, kernel.name) is not None and stored <= allowed.max_bytes


def demangle(names: list[str]) -> list[str]:
    """Readable names by c++filt; unchanged where there is none."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def table(kernels: Iterable[Kernel]) -> str:
    """One line per kernel, the largest register counts first."""
    lines = [f"{'arch':8} {'regs':>4} {'smem':>7} {'stack':>6} {'spills':>11}  kernel"]
    for kernel in sorted(kernels, key=lambda kernel: (-kernel.registers, kernel.name, kernel.architecture)):
        spills = f"{kernel.spill_store_bytes}/{kernel.spill_load_bytes}"
        memory = f"{kernel.static_shared_bytes:7} {kernel.stack_bytes:6}"
        lines.append(f"{kernel.architecture:8} {kernel.registers:4} {memory} {spills:>11}  {kernel.name}")
    return "\n".join(lines) + "\n"
