"""The binary interface of cuBLASLt that we declare is the one in NVIDIA's header, where that is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from flash_attn_kernels.gemm import Epilogue

sys.path.insert(0, str(Path(__file__).parents[2]))

from build_support.toolchain import find_nvcc

ROOT = Path(__file__).parents[2]


def header_folders() -> list[Path]:
    """Where cublasLt.h may be besides the compiler's own folders: beside torch, from the package index."""
    import torch

    return sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include"))


def test_declarations_agree_with_the_header(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    includes = [f"-I{ROOT / 'csrc'}", *(f"-I{folder}" for folder in header_folders())]
    source = Path(__file__).with_name("cublaslt_abi.cpp")
    command = [str(nvcc), "-std=c++20", *includes, "-c", str(source), "-o", str(tmp_path / "abi.o")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cublasLt.h: No such file" in finished.stderr:
        pytest.skip("no cublasLt.h (the package index has it in nvidia-cublas)")
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_python_and_cpp_number_epilogues_alike() -> None:
    text = Path(ROOT, "csrc", "gemm", "cublaslt_abi.h").read_text()
    body = text[text.index("enum LtEpilogue") :]
    body = body[: body.index("};")]
    numbers = {eval(value) for value in re.findall(r"kLt\w+ = ([\d |]+),", body)}
    assert numbers == {int(epilogue) for epilogue in Epilogue}
