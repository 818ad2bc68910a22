"""What a build cost and made: written to build/report.json, summarised for the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from build_support.ptxas import Kernel


@dataclass(frozen=True)
class UnitCost:
    source: str
    seconds: float
    peak_memory_bytes: int  # of the largest compiler process


@dataclass(frozen=True)
class BuildReport:
    cuda: str
    torch: str
    architectures: list[str]
    jobs: int
    compiled_now: (
        int  # translation units compiled by this build; the costs of the others are from earlier ones
    )
    wall_seconds: float  # of this build
    library_bytes: int
    units: list[UnitCost]
    kernels: list[Kernel]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def compile_seconds(self) -> float:
        """All translation units one after another."""
        return sum(unit.seconds for unit in self.units)

    @property
    def slowest(self) -> UnitCost:
        return max(self.units, key=lambda unit: unit.seconds)

    @property
    def largest(self) -> UnitCost:
        return max(self.units, key=lambda unit: unit.peak_memory_bytes)

    def summary(self) -> str:
        """Three lines."""
        return (
            f"{self.compiled_now} of {len(self.units)} translation units compiled in {self.wall_seconds} s, "
            f"{self.jobs} at a time (CUDA {self.cuda}, torch {self.torch}, {';'.join(self.architectures)})\n"
            f"slowest {self.slowest.seconds} s ({self.slowest.source}), "
            f"largest {self.largest.peak_memory_bytes / 2**30:.2f} GiB ({self.largest.source}), "
            f"{self.compile_seconds:.1f} s one after another\n"
            f"library {self.library_bytes / 1e6:.2f} MB, {len(self.kernels)} kernels"
        )
