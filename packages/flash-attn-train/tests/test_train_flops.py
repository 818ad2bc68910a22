"""How many operations a model takes."""

from __future__ import annotations

import pytest
import torch
from flash_attn_models.bert import BertConfig, BertForMaskedLM
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.vit import ViTConfig, ViTForImageClassification
from flash_attn_train.flops import count_parameters, flops_per_sample, peak_tflops
from flash_attn_train.sequence_classifier import BertForSequenceClassification
from torch import nn


def gpt(**changes: object) -> GPTLMHeadModel:
    fields = {"vocab_size": 50257, "max_seqlen": 1024, "n_layer": 12, "n_head": 12, "d_model": 768, **changes}
    return GPTLMHeadModel(GPTConfig(**fields), device="meta")  # type: ignore[arg-type]


def test_gpt2_by_hand() -> None:
    matrices = 12 * 12 * 768**2 + 768 * 50257
    expected = 1024 * (6 * matrices + 12 * 12 * 768 * 1024)
    assert flops_per_sample(gpt(), 1024) == expected
    assert flops_per_sample(gpt(tie_embeddings=False), 1024) == expected  # a tied output layer counts alike
    counts = count_parameters(gpt())
    assert counts.total == counts.trainable == 124_439_808
    assert counts.embeddings == 768 * (50257 + 1024)


def test_llama_shape_by_hand() -> None:
    model = gpt(
        n_head_kv=4, activation="swiglu", d_inner=2048, position="rotary", window=100, window_first_layer=2
    )
    attention = 768 * (2 * 768 + 2 * 4 * 64)
    matrices = 12 * (attention + 3 * 768 * 2048) + 768 * 50257
    seen = 2 * 1024 + 10 * 100
    assert flops_per_sample(model, 1024) == 1024 * (6 * matrices + 12 * 768 * seen)


def test_bert_counts_its_head_for_the_hidden_tokens() -> None:
    model = BertForMaskedLM(
        BertConfig(vocab_size=1000, max_seqlen=64, n_layer=2, n_head=2, d_model=32), device="meta"
    )
    head = 32 * 32 + 32 * 1000
    encoder = 2 * 12 * 32**2
    attention = 12 * 2 * 32 * 64
    assert flops_per_sample(model, 64) == 64 * (6 * (encoder + head) + attention)
    assert flops_per_sample(model, 64, target_share=0.25) == 64 * (6 * (encoder + head // 4) + attention)


def test_sequence_classifier_by_hand() -> None:
    config = BertConfig(vocab_size=1000, max_seqlen=64, n_layer=2, n_head=2, d_model=32)
    model = BertForSequenceClassification(config, 3, device="meta")
    per_token = 6 * 2 * 12 * 32**2 + 12 * 2 * 32 * 64
    assert flops_per_sample(model, 64) == 64 * per_token + 6 * (32**2 + 32 * 3)


def test_vit_by_hand() -> None:
    config = ViTConfig(image_size=32, patch_size=8, n_layer=3, n_head=2, d_model=64, n_classes=10)
    model = ViTForImageClassification(config, device="meta")
    tokens, patches = 17, 16
    per_token = 3 * (6 * 12 * 64**2 + 12 * 64 * tokens)
    assert flops_per_sample(model, 0) == tokens * per_token + 6 * patches * 3 * 64 * 64 + 6 * 64 * 10


def test_measured_agrees_with_the_formula() -> None:
    transformers = pytest.importorskip("transformers", reason="needs a model that is not ours")
    shape = transformers.GPT2Config(vocab_size=500, n_positions=64, n_layer=2, n_head=2, n_embd=64)
    theirs = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    ours = gpt(vocab_size=500, max_seqlen=64, n_layer=2, n_head=2, d_model=64)
    assert flops_per_sample(theirs, 64) == flops_per_sample(ours, 64)
    assert next(theirs.parameters()).device.type == "cpu"  # was not touched


def test_unknown_model_that_cannot_be_measured() -> None:
    class NeedsData(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids if ids.sum() > 0 else -ids

    assert flops_per_sample(NeedsData(), 8) is None


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.0),
        ("NVIDIA H200", "16-mixed", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312.0),
        ("NVIDIA L40S", "bf16-mixed", 362.0),
        ("Another Card", "bf16-mixed", None),
    ],
)
def test_peaks(name: str, precision: str, expected: float | None) -> None:
    assert peak_tflops(name, precision) == expected


@pytest.mark.parametrize(("matmuls", "expected"), [("highest", 19.5), ("high", 156.0)])
def test_peak_of_float32_is_that_of_its_matmuls(
    matmuls: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmuls)
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "32-true") == expected
