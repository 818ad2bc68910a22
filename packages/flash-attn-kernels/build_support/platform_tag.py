"""The platform tag that a compiled library can honestly claim.

A wheel tagged manylinux_2_N promises to load on every system with glibc >= 2.N and the GCC runtime libraries
of that age. N follows from the symbol versions that the library needs.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from build_support.errors import BuildError

# Highest version of each runtime symbol family that a manylinux_2_N system is sure to have (PEP 600 and the
# symbol policies of the manylinux project), as (version, N) in rising order.
_RUNTIME_VERSIONS = {
    "GLIBCXX": (((3, 4, 19), 17), ((3, 4, 22), 24), ((3, 4, 24), 27), ((3, 4, 28), 31), ((3, 4, 29), 34),
                ((3, 4, 30), 35), ((3, 4, 33), 39)),
    "CXXABI": (((1, 3, 7), 17), ((1, 3, 10), 24), ((1, 3, 11), 27), ((1, 3, 12), 31), ((1, 3, 13), 34),
               ((1, 3, 15), 39)),
    "GCC": (((4, 8, 0), 17), ((7, 0, 0), 27), ((12, 0, 0), 35), ((14, 0, 0), 39)),
}  # fmt: skip
_OLDEST = 17


def needed_versions(library: Path) -> set[str]:
    """Symbol versions that `library` asks of other libraries, such as {"GLIBC_2.34", "GLIBCXX_3.4.29"}."""
    with library.open("rb") as file:
        needs = [
            section for section in ELFFile(file).iter_sections() if isinstance(section, GNUVerNeedSection)
        ]
        return {entry.name for need in needs for _, entries in need.iter_versions() for entry in entries}


def manylinux_minor(versions: Iterable[str]) -> int:
    """Smallest N such that a manylinux_2_N system has all of `versions`."""
    minor = _OLDEST
    for name in versions:
        family, _, number = name.rpartition("_")
        version = tuple(int(part) for part in number.split("."))
        if family == "GLIBC":
            minor = max(minor, version[1])
        elif family in _RUNTIME_VERSIONS:
            minor = max(minor, _first_with(family, version))
        else:
            raise BuildError(f"the library needs the symbol version {name}, which no platform tag promises")
    return minor


def platform_tag(library: Path) -> str:
    """For example manylinux_2_34_x86_64."""
    return f"manylinux_2_{manylinux_minor(needed_versions(library))}_{platform.machine()}"


def _first_with(family: str, version: tuple[int, ...]) -> int:
    for known, minor in _RUNTIME_VERSIONS[family]:
        if version <= known:
            return minor
    raise BuildError(f"{family} {version} is newer than every known platform tag: extend _RUNTIME_VERSIONS")
