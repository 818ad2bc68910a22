"""Sources -> build.ninja, in a build folder that is never inside the package.

Everything is relative to the build folder, and compilers are reached through links in `toolchain/`, so that
the command lines, and with them ninja's idea of what is up to date, stay the same when an isolated build
environment puts torch or nvcc somewhere else. The versions are in the stamp.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from build_support.architectures import Architecture, gencode_flags, is_hopper_only
from build_support.bounded_spins import FLAG as BOUNDED_SPINS_FLAG
from build_support.toolchain import Toolchain

LIBRARY = "libflash_attn_kernels.so"

COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # freezes torch's stable ABI at 2.11
    "-Xptxas=-v",  # the resource report that ptxas.py reads
)
# libtorch.so is the umbrella of CPU and CUDA builds alike. --no-as-needed keeps it among the needed ones:
# torch loads its libraries privately, so without it the stable-ABI functions would not be found. No rpath.
LINK_FLAGS = (
    "-shared",
    "-Wl,--no-as-needed",
    "-ltorch",
    "-Wl,--as-needed",
    "-lcudart_static",
    "-ldl",
    "-lrt",
    "-lpthread",
)


@dataclass(frozen=True)
class TranslationUnit:
    source: Path  # relative to the build folder
    object: Path  # likewise


def handwritten_units(root: Path, build_dir: Path) -> list[TranslationUnit]:
    """One unit for every csrc/**/*.cu."""
    csrc = root / "csrc"
    return [
        TranslationUnit(
            source=Path(os.path.relpath(source, build_dir)),
            object=Path("objects", source.relative_to(csrc)).with_suffix(".o"),
        )
        for source in sorted(csrc.rglob("*.cu"))
    ]


def write_generated_units(
    build_dir: Path, instantiations: Iterable[tuple[str, str]]
) -> list[TranslationUnit]:
    """Writes the generated sources, touching only what changed and deleting what is no longer generated."""
    folder = build_dir / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    units = []
    for name, text in instantiations:
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        units.append(
            TranslationUnit(Path("generated", name), Path("objects", "generated", name).with_suffix(".o"))
        )
    current = {unit.source.name for unit in units}
    for stale in folder.iterdir():
        if stale.name not in current:
            stale.unlink()
    return units


def link_toolchain(build_dir: Path, toolchain: Toolchain) -> None:
    """(Re)makes the links in `toolchain/`."""
    folder = build_dir / "toolchain"
    folder.mkdir(parents=True, exist_ok=True)
    targets = {
        "cuda": toolchain.cuda_home,
        "cuda-lib": toolchain.cuda_library_dir,
        "torch": toolchain.torch_dir,
        "python": Path(sys.executable),
    }
    for name, target in targets.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def unit_flags(source: Path, architectures: list[Architecture], *, bounded_spins: bool) -> list[str]:
    """The flags that not all translation units share. Only Hopper's kernels have waits that can be endless."""
    bounded = [BOUNDED_SPINS_FLAG] if bounded_spins and is_hopper_only(source) else []
    return [*gencode_flags(source, architectures), *bounded]


def write_ninja_file(
    root: Path,
    build_dir: Path,
    units: list[TranslationUnit],
    architectures: list[Architecture],
    stamp: str,
    *,
    bounded_spins: bool = False,
) -> None:
    """Writes build.ninja; unchanged text leaves the file alone."""
    csrc = os.path.relpath(root / "csrc", build_dir)
    support = os.path.relpath(Path(__file__).parent, build_dir)
    includes = (
        f"-I{csrc} -isystem toolchain/torch/include -isystem toolchain/torch/include/torch/csrc/api/include"
    )
    lines = [
        "ninja_required_version = 1.8",
        f"stamp = {stamp}",
        f"flags = {' '.join(COMPILE_FLAGS)} {includes}",
        "rule compile",
        f"  command = toolchain/python {support}/compile_one.py --object $out --inside {csrc} "
        '--inside generated --stamp "$stamp" -- toolchain/cuda/bin/nvcc $flags $unit_flags -c $in',
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = ${{cxx}} $in -o $out -Ltoolchain/torch/lib -Ltoolchain/cuda-lib {' '.join(LINK_FLAGS)}",
        "  description = link $out",
        f"cxx = {os.environ.get('NVCC_CCBIN') or 'g++'}",
    ]
    for unit in units:
        flags = unit_flags(unit.source, architectures, bounded_spins=bounded_spins)
        lines += [f"build {unit.object}: compile {unit.source}", f"  unit_flags = {' '.join(flags)}"]
    lines += [
        f"build {LIBRARY}: link {' '.join(str(unit.object) for unit in units)}",
        f"default {LIBRARY}",
        "",
    ]
    path = build_dir / "build.ninja"
    text = "\n".join(lines)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
