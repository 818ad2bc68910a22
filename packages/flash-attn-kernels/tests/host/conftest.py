"""Compiles programs of the kernels' own headers as plain C++, and talks to them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from build_support.toolchain import find_nvcc

ROOT = Path(__file__).parents[2]
Host = Callable[[Sequence[tuple[Any, ...]]], list[Any]]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The Hopper kernels: answers requests, each a function's name and whole numbers, in one run of the program."""
    return _program(tmp_path_factory, "sm90_host_functions")


@pytest.fixture(scope="session")
def decode_host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """Likewise inference attention."""
    return _program(tmp_path_factory, "decode_host_functions")


@pytest.fixture(scope="session")
def kernels_host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The Hopper kernels themselves, without their numbers."""
    return _program(tmp_path_factory, "sm90_kernels_on_host")


def _program(tmp_path_factory: pytest.TempPathFactory, name: str) -> Host:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: what kernels compute before they run is compiled with CUDA's headers")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the workers of one run
    program = folder / name
    with Path(folder, f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _compile(nvcc, Path(__file__).with_name(f"{name}.cpp"), program)

    def answer(requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        lines = "".join(" ".join(map(str, request)) + "\n" for request in requests)
        finished = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return [json.loads(line) for line in finished.stdout.splitlines()]

    return answer


def _compile(nvcc: Path, source: Path, program: Path) -> None:
    # A sum of 32 bits that overflows ends the program.
    checks = "-Xcompiler=-fsanitize=signed-integer-overflow,-fsanitize-undefined-trap-on-error"
    command = [str(nvcc), "-std=c++20", "-O1", checks, f"-I{ROOT / 'csrc'}", "-o", str(program)]
    finished = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        pytest.fail(f"{source.name} does not compile:\n{finished.stdout}{finished.stderr}", pytrace=False)
