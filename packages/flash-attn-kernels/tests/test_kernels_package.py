"""The package as a whole: what importing it costs, and its self-test."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout


def test_import_loads_no_library_no_compiler_and_no_triton() -> None:
    loaded = run(
        "import sys, torch; before = set(sys.modules); import flash_attn_kernels, flash_attn_kernels.library as lib;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] != 'flash_attn_kernels']);"
        "print(lib._load.cache_info().currsize)"
    ).splitlines()
    assert not any(name in loaded[0] for name in ("torch._dynamo", "triton", "numpy")), loaded[0]
    assert loaded[1] == "0"


def test_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    from flash_attn_kernels.__main__ import main

    assert main() == 0
    output = capsys.readouterr().out
    assert "ok   cpu torch.bfloat16 (portable), causal" in output
    assert (
        "ok   cpu torch.bfloat16 (portable), modifiers" in output and f"torch {torch.__version__}" in output
    )


def test_self_test_fails_when_attention_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flash_attn_kernels import __main__, flash_attn_func

    monkeypatch.setattr(
        __main__,
        "flash_attn_func",
        lambda q, k, v, causal=False, **options: flash_attn_func(q, k, v, **options),
    )
    assert __main__.main() == 1
    output = capsys.readouterr().out
    assert "FAIL cpu torch.float32 (portable), causal" in output
    assert "ok   cpu torch.float32 (portable), modifiers" in output


def test_self_test_has_help() -> None:
    command = [sys.executable, "-m", "flash_attn_kernels", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m flash_attn_kernels") and "exit code 0" in done.stdout
