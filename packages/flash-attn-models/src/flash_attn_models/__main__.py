"""Self-test, ``python -m flash_attn_models``: exit code 0 if small models compute what they should."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import flash_attn_models
from flash_attn_models.attention import attention_path
from flash_attn_models.bert import BertConfig, BertModel
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.gpt.families import FAMILIES, named_config
from flash_attn_models.pretrained import load_pretrained, save_pretrained
from flash_attn_models.vit import ViTConfig, ViTForImageClassification

_BERT = BertConfig(vocab_size=301, max_seqlen=64, n_layer=2, n_head=2, d_model=64)
_VIT = ViTConfig(image_size=32, patch_size=8, n_layer=2, n_head=2, d_model=64, n_classes=10)


def main() -> int:
    """Run all checks, on the GPU if there is one; print what was found; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"flash-attn-models {flash_attn_models.__version__}, torch {torch.__version__}")
    print(f"Python {platform.python_version()}")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, {dtype}")
    results = []
    for name, family in FAMILIES.items():
        config = small_config(named_config(next(iter(family.sizes))))
        model = _made(GPTLMHeadModel, config, device)
        print(f"{name}: {attention_path(config, seqlen=config.max_seqlen, device=device, dtype=dtype)}")
        results.append(_report(name, "cache equals no cache", _cache_equals_no_cache(model)))
        results.append(_report(name, "survives saving", _survives_saving(model)))
    bert = _made(BertModel, _BERT, device)
    results.append(_report("bert", "padding changes nothing", _padding_changes_nothing(bert)))
    results.append(_report("bert", "survives saving", _survives_saving(bert)))
    vit = _made(ViTForImageClassification, _VIT, device)
    results.append(_report("vit", "images do not see each other", _images_are_alone(vit)))
    results.append(_report("vit", "survives saving", _survives_saving(vit)))
    return 0 if all(results) else 1


def small_config(config: GPTConfig) -> GPTConfig:
    """The same architecture, small enough for a second on a CPU."""
    heads_kv = {config.n_head: None, 1: 1}.get(config.num_heads_kv, 2)
    partial = config.position == "rotary" and config.num_rotary_dims < config.head_dim
    return dataclasses.replace(
        config,
        vocab_size=301,
        max_seqlen=64,
        n_layer=2,
        n_head=4,
        n_head_kv=heads_kv,
        d_model=64,
        d_head=None,
        d_inner=96,
        rotary_dim=8 if partial else None,
        rotary_scaling=None,
        window=None if config.window is None else 16,
        window_first_layer=0,
        window_layers=None,
        softmax_scale=None,
        d_embedding=None if config.d_embedding is None else 48,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _made(kind: Any, config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    return kind(config, device=device).eval()


def _report(name: str, check: str, ok: bool) -> bool:
    print(f"{name}: {check}: {'ok' if ok else 'FAILED'}")
    return ok


@torch.no_grad()
def _cache_equals_no_cache(model: GPTLMHeadModel) -> bool:
    """Greedy tokens from the cached loop are those of a full forward pass over the result, in fp32."""
    prompt = torch.randint(model.config.vocab_size, (2, 9), device=model.head_weight.device)
    tokens = generate(model, prompt, 20)
    return torch.equal(model(tokens).argmax(-1)[:, 8:-1], tokens[:, 9:])


@torch.no_grad()
def _padding_changes_nothing(model: BertModel) -> bool:
    """A padded row has the hidden states of the same tokens alone, in fp32."""
    device = model.embeddings.word_embeddings.weight.device
    tokens = torch.randint(model.config.vocab_size, (2, 12), device=device)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    padded, alone = model(tokens, mask).hidden[0, :7], model(tokens[:1, :7]).hidden[0]
    return torch.allclose(padded, alone, atol=1e-4)


@torch.no_grad()
def _images_are_alone(model: ViTForImageClassification) -> bool:
    """The logits of an image are the same in a batch, in fp32."""
    images = torch.randn(2, 3, 32, 32, device=next(model.parameters()).device)
    return torch.allclose(model(images).logits[:1], model(images[:1]).logits, atol=1e-4)


@torch.no_grad()
def _survives_saving(model: Any) -> bool:
    """Saved in Hugging Face layout and loaded again, all weights are the same bits."""
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as parent:
        save_pretrained(model, Path(parent) / "model")
        loaded = load_pretrained(Path(parent) / "model", device=device).state_dict()
    return all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m flash_attn_models", description=__doc__).parse_args()
    sys.exit(main())
