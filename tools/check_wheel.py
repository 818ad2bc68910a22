"""Checks that built wheels are what they claim to be and may be published.

    python tools/check_wheel.py dist/*.whl [--allow-pure]

Names, version and tags agree; the license and py.typed are inside and nothing foreign is; the size is within
budget. The compiled library is in the kernels wheel (a release must have it; --allow-pure accepts a wheel
without), its tag is the one that its symbols justify, and it touches torch only through stable C functions.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import kernels_build  # noqa: F401  # before build_support
from build_support.platform_tag import platform_tag
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerSymSection
from elftools.elf.sections import SymbolTableSection
from repository import Package, packages, version

MAXIMUM_BYTES = 60_000_000
LIBRARY = "flash_attn_kernels/lib/libflash_attn_kernels.so"
# Everything else that the library needs must be in these, which every glibc system has.
NEEDED_LIBRARIES = re.compile(
    r"libtorch\.so|libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(c|m|dl|rt|pthread)\.so\.\d|ld-linux-.*\.so\.\d"
)
# torch's stable C functions, and three hooks that toolchains reference weakly.
STABLE_SYMBOL = re.compile(r"(aoti_torch_|torch_)\w+|__gmon_start__|_ITM_(de)?registerTMCloneTable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--allow-pure", action="store_true", help="accept a kernels wheel without the library"
    )
    arguments = parser.parse_args()
    failed = False
    for wheel in arguments.wheels:
        problems = wheel_problems(wheel, version(), allow_pure=arguments.allow_pure)
        failed = failed or bool(problems)
        print(f"{'FAILED' if problems else 'ok':6}  {wheel.stat().st_size / 1e6:7.3f} MB  {wheel.name}")
        for problem in problems:
            print(f"        {problem}")
    return 1 if failed else 0


def wheel_problems(wheel: Path, shared_version: str, *, allow_pure: bool = False) -> list[str]:
    """What is wrong with `wheel`, one line each."""
    name, wheel_version, *tags = wheel.name.removesuffix(".whl").split("-")
    package = next((candidate for candidate in packages() if candidate.module == name), None)
    if package is None or len(tags) != 3:
        return [f"{wheel.name} is not the name of a wheel of one of the four packages"]
    problems = []
    if wheel_version != shared_version:
        problems.append(f"version {wheel_version}, expected {shared_version}")
    if wheel.stat().st_size > MAXIMUM_BYTES:
        problems.append(f"{wheel.stat().st_size} bytes, the budget is {MAXIMUM_BYTES}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"{name}-{wheel_version}.dist-info"
        problems += _content_problems(package, names, info)
        header = HeaderParser().parsestr(archive.read(f"{info}/WHEEL").decode())
        problems += _library_problems(package, archive, names, tags, header["Root-Is-Purelib"], allow_pure)
    if header.get_all("Tag") != ["-".join(tags)]:
        problems.append(f"WHEEL says {header.get_all('Tag')}, the file name says {'-'.join(tags)}")
    return problems


def _content_problems(package: Package, names: set[str], info: str) -> list[str]:
    wanted = {f"{package.module}/__init__.py", f"{package.module}/py.typed", f"{info}/licenses/LICENSE"}
    problems = [f"{missing} is missing" for missing in sorted(wanted - names)]
    foreign = sorted(name for name in names if name.split("/")[0] not in {package.module, info})
    return problems + [f"{name} does not belong here" for name in foreign]


def _library_problems(
    package: Package,
    archive: zipfile.ZipFile,
    names: set[str],
    tags: list[str],
    purelib: str,
    allow_pure: bool,
) -> list[str]:
    compiled = {name for name in names if re.search(r"\.(so|pyd|dll|dylib)(\.|$)", name)}
    pure_tag = tags == ["py3", "none", "any"]
    if not compiled:
        problems = [] if pure_tag else [f"tagged {'-'.join(tags)}, but holds no compiled code"]
        if purelib != "true":
            problems.append(f"Root-Is-Purelib is {purelib} in a wheel without compiled code")
        if package.layer == "kernels" and not allow_pure:
            problems.append(
                f"{LIBRARY} is missing: built without compiling; set FLASH_ATTN_KERNELS_BUILD=always"
            )
        return problems
    if package.layer != "kernels" or compiled != {LIBRARY}:
        return [f"compiled code {sorted(compiled)}, expected {LIBRARY} in flash-attn-kernels alone"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(archive.extract(LIBRARY, folder))
        honest = ["py3", "none", platform_tag(library)]
        problems = elf_problems(library)
    if tags != honest:
        problems.append(f"tagged {'-'.join(tags)}, but the library justifies {'-'.join(honest)}")
    if purelib != "false":
        problems.append(f"Root-Is-Purelib is {purelib} in a wheel with compiled code")
    return problems


def elf_problems(library: Path) -> list[str]:
    """Undefined symbols outside torch's stable functions, foreign libraries, baked-in search paths."""
    problems = []
    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic = elf.get_section_by_name(".dynamic")
        symbols = elf.get_section_by_name(".dynsym")
        versions = elf.get_section_by_name(".gnu.version")
        if not isinstance(dynamic, DynamicSection) or not isinstance(symbols, SymbolTableSection):
            return [f"{library.name} is not a dynamic library"]
        for tag in dynamic.iter_tags():
            kind = tag.entry.d_tag
            value = getattr(tag, kind.removeprefix("DT_").lower(), "")  # pyelftools names it after the kind
            if kind == "DT_NEEDED" and not NEEDED_LIBRARIES.fullmatch(value):
                problems.append(f"needs {value}")
            elif kind in ("DT_RPATH", "DT_RUNPATH"):
                problems.append(f"has the search path {value}")
        for index, symbol in enumerate(symbols.iter_symbols()):
            if index == 0 or symbol.entry.st_shndx != "SHN_UNDEF":
                continue
            # Versioned symbols come from the C and C++ runtimes; the platform tag answers for them.
            versioned = isinstance(versions, GNUVerSymSection) and versions.get_symbol(index).entry[
                "ndx"
            ] not in (
                "VER_NDX_LOCAL",
                "VER_NDX_GLOBAL",
            )
            if not versioned and not STABLE_SYMBOL.fullmatch(symbol.name):
                problems.append(f"needs {symbol.name}, which is not one of torch's stable functions")
    return problems


if __name__ == "__main__":
    sys.exit(main())
