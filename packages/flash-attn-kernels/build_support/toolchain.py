"""Finds what a build needs: nvcc (on the machine or among the installed packages), torch, ninja, g++."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_support.errors import BuildError

# Code built by CUDA 13.0 runs with every driver >= 580. Newer 13.x compilers would need newer drivers for the
# embedded PTX, so the compiler taken from the package index stays at 13.0.
MINIMUM_CUDA = (13, 0)
COMPILER_WHEELS = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)
# torch for headers and libtorch.so: any version >= 2.11 serves, the library uses only the ABI frozen at 2.11.
BUILD_REQUIREMENTS = ("torch>=2.11", "ninja>=1.11", "pyelftools>=0.31")


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    cuda_home: Path
    cuda_library_dir: Path  # holds libcudart_static.a
    cuda_version: str
    torch_dir: Path
    torch_version: str
    ninja: Path

    @property
    def stamp(self) -> str:
        """Part of every command line, so that ninja rebuilds when a version changes."""
        return f"cuda-{self.cuda_version} torch-{self.torch_version}"


def build_requirements() -> list[str]:
    """What a build environment must install before `find_toolchain` can succeed there."""
    compiler = [] if find_nvcc() else list(COMPILER_WHEELS)
    return [*BUILD_REQUIREMENTS, *compiler]


def find_toolchain() -> Toolchain:
    nvcc = find_nvcc()
    if nvcc is None:
        wheels = " ".join(f'"{wheel}"' for wheel in COMPILER_WHEELS)
        raise BuildError(
            f"no nvcc >= {_dotted(MINIMUM_CUDA)} in CUDA_HOME, on PATH or among the installed packages. "
            f"Install a CUDA toolkit, or the compiler from the package index: pip install {wheels}"
        )
    if not os.environ.get("NVCC_CCBIN") and shutil.which("g++") is None:
        raise BuildError("no g++ on PATH: install a C++20 host compiler, or name one in NVCC_CCBIN")
    cuda_home = _cuda_home(nvcc)
    torch_dir, torch_version = _find_torch()
    return Toolchain(
        nvcc=nvcc,
        cuda_home=cuda_home,
        cuda_library_dir=_cuda_library_dir(cuda_home),
        cuda_version=_dotted(nvcc_version(nvcc) or ()),
        torch_dir=torch_dir,
        torch_version=torch_version,
        ninja=_find_ninja(),
    )


def find_nvcc() -> Path | None:
    """The first nvcc that is new enough: $CUDA_HOME, PATH, then the packages of the running interpreter."""
    for candidate in _nvcc_candidates():
        version = nvcc_version(candidate)
        if version is not None and version >= MINIMUM_CUDA:
            return candidate
    return None


def find_cuobjdump() -> Path | None:
    """Which tests read machine code with: $CUDA_HOME, beside nvcc, PATH, then the one that Triton brings."""
    nvcc = find_nvcc()
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += [nvcc.parent, _cuda_home(nvcc) / "bin"] if nvcc else []
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    candidates = (folder / "cuobjdump" for folder in folders)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def nvcc_version(nvcc: Path) -> tuple[int, ...] | None:
    """(major, minor, patch), or None where `nvcc` does not run."""
    try:
        answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(int(part) for part in found.groups()) if found else None


def _nvcc_candidates() -> Iterator[Path]:
    cuda_home = os.environ.get("CUDA_HOME")
    if cuda_home:
        yield Path(cuda_home, "bin", "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    nvidia = importlib.util.find_spec("nvidia")  # a namespace package: one folder per sys.path entry
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"))


def _cuda_home(nvcc: Path) -> Path:
    """Asked of nvcc itself, because the nvcc on PATH may be a wrapper script somewhere else."""
    dry_run = subprocess.run(
        [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if found is None:
        raise BuildError(
            f"{nvcc} --dryrun does not say where its toolkit is: {dry_run.stderr.strip()[-500:]}"
        )
    return Path(found.group(1).strip()).resolve()


def _cuda_library_dir(cuda_home: Path) -> Path:
    for name in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib"):
        if (cuda_home / name / "libcudart_static.a").is_file():
            return cuda_home / name
    raise BuildError(
        f"no libcudart_static.a under {cuda_home}: install the CUDA runtime development files "
        "(package nvidia-cuda-runtime on the package index)"
    )


def _find_torch() -> tuple[Path, str]:
    spec = importlib.util.find_spec("torch")  # found, not imported: importing takes seconds
    if spec is None or spec.origin is None:
        raise BuildError(f"torch is not installed for {sys.executable}: pip install 'torch>=2.11'")
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 11):
        raise BuildError(f"torch: got {version}, expected >= 2.11: pip install 'torch>=2.11'")
    return Path(spec.origin).parent, version


def _find_ninja() -> Path:
    beside_python = Path(sys.executable).parent / "ninja"
    found = str(beside_python) if beside_python.is_file() else shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja on PATH: pip install ninja")
    return Path(found)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
