"""FLASH_ATTN_KERNELS_ARCHS: the GPU architectures to make machine code for.

A list such as "80;90+PTX": a number asks for machine code of that architecture, "+PTX" adds intermediate
code that the driver compiles on first use on any newer GPU. Machine code runs on its own major version from
its own minor version up: 80 serves 8.0, 8.6 and 8.9, and 90 serves 9.0. The default therefore runs natively
on Ampere, Ada and Hopper and starts slower, once per machine, on what came later.

Sources in a folder `sm90`, and generated ones whose names start with `sm90_`, use Hopper-only instructions: they
are compiled for 90a alone, whatever the list says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from build_support.errors import BuildError

VARIABLE = "FLASH_ATTN_KERNELS_ARCHS"
DEFAULT = "80;90+PTX"
MINIMUM = 80


@dataclass(frozen=True)
class Architecture:
    number: int
    ptx: bool

    def __str__(self) -> str:
        return f"{self.number}{'+PTX' if self.ptx else ''}"


def requested_architectures(text: str | None = None) -> list[Architecture]:
    """Parses `text` (default: the environment variable); BuildError for anything that is not such a list."""
    if text is None:
        text = os.environ.get(VARIABLE, "") or DEFAULT
    architectures = []
    for item in text.split(";"):
        found = re.fullmatch(r"(\d+)(\+PTX)?", item.strip())
        if found is None or int(found.group(1)) < MINIMUM:
            raise BuildError(
                f"{VARIABLE}: got {text!r}, expected numbers >= {MINIMUM} separated by ';', each with an "
                f"optional +PTX, such as {DEFAULT!r}"
            )
        architectures.append(Architecture(int(found.group(1)), ptx=found.group(2) is not None))
    return architectures


def is_hopper_only(source: Path) -> bool:
    return "sm90" in source.parent.parts or source.name.startswith("sm90_")


def gencode_flags(source: Path, architectures: list[Architecture]) -> list[str]:
    """nvcc's -gencode flags for one translation unit."""
    if is_hopper_only(source):
        return ["-gencode", "arch=compute_90a,code=sm_90a"]
    flags = []
    for architecture in architectures:
        virtual = f"compute_{architecture.number}"
        code = f"sm_{architecture.number}"
        flags += ["-gencode", f"arch={virtual},code=" + (f"[{code},{virtual}]" if architecture.ptx else code)]
    return flags
