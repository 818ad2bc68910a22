"""Reads what cuobjdump says about machine code: the instructions and resources of every kernel. For tests."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)\s*$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_USAGE = re.compile(r"^\s*Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", re.MULTILINE)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH_TARGET = re.compile(r"\b0x([0-9a-f]+)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without its predicate

    @property
    def opcode(self) -> str:
        """With its modifiers, such as MUFU.EX2."""
        return self.text.split(maxsplit=1)[0]

    def branch_target(self) -> int | None:
        found = _BRANCH_TARGET.search(self.text) if self.opcode.startswith("BRA") else None
        return int(found.group(1), 16) if found else None


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread at launch
    stack_bytes: int
    local_bytes: int


def resources(cuobjdump: Path, cubin: Path) -> dict[str, Resources]:
    """By the mangled name of the kernel."""
    usage = _run(cuobjdump, "-res-usage", cubin)
    return {name: Resources(*map(int, numbers)) for name, *numbers in _USAGE.findall(usage)}


def instructions(cuobjdump: Path, cubin: Path) -> dict[str, list[Instruction]]:
    """By the mangled name of the kernel."""
    return parse_instructions(_run(cuobjdump, "-sass", cubin))


def parse_instructions(listing: str) -> dict[str, list[Instruction]]:
    names = list(_FUNCTION.finditer(listing))
    ends = [*(name.start() for name in names[1:]), len(listing)]
    return {
        name.group(1): [
            Instruction(int(address, 16), _PREDICATE.sub("", text))
            for address, text in _INSTRUCTION.findall(listing[name.end() : end])
        ]
        for name, end in zip(names, ends, strict=True)
    }


def extract_cubins(cuobjdump: Path, library: Path, architecture: str, folder: Path) -> list[Path]:
    """The machine code of one architecture, such as sm_90a, one file for each translation unit that has some."""
    _run(cuobjdump, "-xelf", "all", library.resolve(), folder=folder)
    return sorted(folder.glob(f"*.{architecture}.cubin"))


def _run(cuobjdump: Path, *arguments: str | Path, folder: Path | None = None) -> str:
    command = [str(cuobjdump), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {finished.stderr.strip()}")
    return finished.stdout
