"""The package as a whole: light imports, self-test, what it passes on from the layer below, README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import flash_attn_kernels
import flash_attn_ops
import pytest
import torch
from flash_attn_ops import attention

README = Path(__file__).parents[1] / "README.md"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_importing_loads_neither_triton_nor_cuda() -> None:
    code = """
import sys, torch, flash_attn_kernels
below = set(sys.modules)
import flash_attn_ops.attention, flash_attn_ops.norm, flash_attn_ops.rotary, flash_attn_ops.cross_entropy
import flash_attn_ops.linear_cross_entropy, flash_attn_ops.activations, flash_attn_ops.fused_dense
import flash_attn_ops.distributed, flash_attn_ops.tensor_parallel, flash_attn_ops.patch_embed, flash_attn_ops.padding
loaded = set(sys.modules) - below
assert loaded and all(name.startswith(("flash_attn_ops", "flash_attn_kernels.gemm")) for name in loaded), loaded
assert not any(name.endswith("triton_kernels") for name in loaded), loaded
assert not torch.cuda.is_initialized(), "cuda"
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_everything_on_a_cpu_works_without_triton() -> None:
    code = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
without = lambda name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)
PathFinder.find_spec = staticmethod(without)
import runpy
runpy.run_module("flash_attn_ops", run_name="__main__")
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no triton" in result.stdout


def test_self_test_passes() -> None:
    result = run_python("-m", "flash_attn_ops")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"flash-attn-ops {flash_attn_ops.__version__}" in result.stdout
    for name in ("attention", "layer_norm", "rms_norm", "rotary", "cross_entropy", "activations", "mlp"):
        assert f"{name}: ok" in result.stdout


def test_self_test_fails_when_a_result_is_wrong() -> None:
    code = """
import runpy, torch, flash_attn_ops.norm as norm
right = norm.rms_norm
def wrong(x, *args, **options):
    return right(x if x.dtype == torch.float64 else 1.01 * x, *args, **options)
norm.rms_norm = wrong
runpy.run_module("flash_attn_ops", run_name="__main__")
"""
    result = run_python("-c", code)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "rms_norm: FAILED" in result.stdout and "layer_norm: ok" in result.stdout


def test_attention_is_the_kernels_layer() -> None:
    for name in ("flash_attn_func", "flash_attn_varlen_func", "explain", "Explanation"):
        assert getattr(attention, name) is getattr(flash_attn_kernels, name)


SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_has_snippets() -> None:
    assert SNIPPETS


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_readme_snippets_run(index: int) -> None:
    torch.manual_seed(0)
    exec(compile(SNIPPETS[index], f"README.md, snippet {index}", "exec"), {"__name__": "readme"})


def test_readme_names_every_option() -> None:
    import inspect

    from flash_attn_ops.activations import activate, gated, gelu, swiglu
    from flash_attn_ops.cross_entropy import cross_entropy
    from flash_attn_ops.fused_dense import gated_mlp, linear, mlp
    from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
    from flash_attn_ops.norm import layer_norm, rms_norm
    from flash_attn_ops.rotary import (
        RotaryEmbedding,
        apply_rotary_emb,
        apply_rotary_emb_qk,
        apply_rotary_emb_qkv_,
    )

    text = README.read_text()
    for function in (
        *(activate, gated, gelu, swiglu, cross_entropy, linear_cross_entropy, linear, mlp, gated_mlp),
        *(
            layer_norm,
            rms_norm,
            RotaryEmbedding,
            apply_rotary_emb,
            apply_rotary_emb_qk,
            apply_rotary_emb_qkv_,
        ),
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert f"`{name}`" in text, f"{function.__name__}: {name}"


def test_self_test_has_help() -> None:
    command = [sys.executable, "-m", "flash_attn_ops", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m flash_attn_ops") and "exit code 0" in done.stdout
