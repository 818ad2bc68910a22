"""The package as a whole: light imports, self-test, what it passes on to the layer above, README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import flash_attn_models
import pytest
import torch
from flash_attn_models import attention, loss
from flash_attn_models.gpt import GPTConfig
from flash_attn_models.gpt.families import FAMILIES

README = Path(__file__).parents[1] / "README.md"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_loads_nothing_heavy():
    heavy = [
        "transformers",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "timm",
        "torchvision",
        "sentencepiece",
        "triton",
    ]
    parts = [
        "",
        ".gpt.families",
        ".gpt.megatron",
        ".gpt.meta_llama",
        ".bert",
        ".vit",
        ".transformers_integration",
    ]
    imports = ", ".join(f"flash_attn_models{part}" for part in parts)
    code = f"import {imports}, sys; print([name for name in {heavy} if name in sys.modules])"
    result = run_python("-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_self_test_passes():
    result = run_python("-m", "flash_attn_models")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"flash-attn-models {flash_attn_models.__version__}" in result.stdout
    assert "attention path" in result.stdout
    for name in (*FAMILIES, "bert", "vit"):
        assert f"{name}: survives saving: ok" in result.stdout
    assert "FAILED" not in result.stdout


def test_self_test_fails_when_a_result_is_wrong():
    code = (
        "import runpy, sys, flash_attn_models.layers.attention as a; right = a.flash_attn_func\n"
        "a.flash_attn_func = lambda q, k, v, **options: right(q, k, v, **{**options, 'causal': False})\n"
        "runpy.run_module('flash_attn_models', run_name='__main__')"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    assert "FAILED" in result.stdout


def test_attention_path_names_path_and_reason():
    config = GPTConfig(vocab_size=8, max_seqlen=4096, n_layer=1, n_head=4, d_model=256)
    explanation = attention.attention_path(config, seqlen=4096, device="cpu", dtype=torch.float32)
    assert explanation.path == "portable"
    assert "cpu" in str(explanation)


def test_attention_path_is_about_all_layers_or_one(monkeypatch):
    sizes = {"vocab_size": 8, "max_seqlen": 64, "n_layer": 3, "n_head": 4, "d_model": 64, "window": 4}
    config = GPTConfig(**sizes, window_layers=(True, False, False))
    asked = {"seqlen": 64, "device": "cpu", "dtype": torch.float32}

    def explain(*args, window_size, **options):  # as if windows took a slower path
        slow = window_size != (-1, -1)
        return attention.Explanation("sm80" if slow else "sm90", {"sm90": ("a window",)} if slow else {})

    monkeypatch.setattr(attention, "explain", explain)
    assert attention.attention_path(config, **asked).path == "sm80"
    paths = [attention.attention_path(config, **asked, layer=layer).path for layer in range(3)]
    assert paths == ["sm80", "sm90", "sm90"]
    with pytest.raises(ValueError, match=r"layer: got 3; expected a layer of n_layer=3"):
        attention.attention_path(config, **asked, layer=3)


def test_loss_and_attention_are_passed_on():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 6, -100, 3, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss.cross_entropy(logits, labels), expected)
    torch.testing.assert_close(loss.CrossEntropyLoss()(logits, labels), expected)
    q = torch.randn(1, 5, 2, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *[q.transpose(1, 2)] * 3, is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention.flash_attn_func(q, q, q, causal=True), expected)


@pytest.mark.skipif(not README.exists(), reason="tests run without the package's README beside them")
def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:  # in order: later ones build on earlier ones
        exec(compile(block, str(README), "exec"), namespace)


def test_self_test_has_help():
    command = [sys.executable, "-m", "flash_attn_models", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("usage: python -m flash_attn_models") and "exit code 0" in done.stdout
