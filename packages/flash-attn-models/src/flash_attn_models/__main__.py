"""Self-test, ``python -m flash_attn_models``: exit code 0 if small models compute what they should."""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

import torch

import flash_attn_models
from flash_attn_models.attention import attention_path
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.pretrained import load_pretrained, save_pretrained

_CONFIGS = {
    "gpt2": GPTConfig.gpt2("small", vocab_size=301, max_seqlen=64, n_layer=2, n_head=2, d_model=128),
    "llama": GPTConfig.llama(
        "tinyllama-1.1b",
        vocab_size=301,
        max_seqlen=64,
        n_layer=2,
        n_head=4,
        n_head_kv=2,
        d_model=256,
        d_inner=384,
    ),
}


def main() -> int:
    """Run all checks, on the GPU if there is one; print what was found; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"flash-attn-models {flash_attn_models.__version__}, torch {torch.__version__}")
    print(f"Python {platform.python_version()}")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, {dtype}")
    passed = True
    for name, config in _CONFIGS.items():
        print(f"{name}: {attention_path(config, seqlen=config.max_seqlen, device=device, dtype=dtype)}")
        for check in (_cache_equals_no_cache, _survives_saving):
            ok = check(config, device)
            print(f"{name}: {check.__name__.strip('_').replace('_', ' ')}: {'ok' if ok else 'FAILED'}")
            passed = passed and ok
    return 0 if passed else 1


def _model(config: GPTConfig, device: torch.device) -> GPTLMHeadModel:
    torch.manual_seed(0)
    return GPTLMHeadModel(config, device=device).eval()


@torch.no_grad()
def _cache_equals_no_cache(config: GPTConfig, device: torch.device) -> bool:
    """Greedy tokens from the cached loop are those of a full forward pass over the result, in fp32."""
    model = _model(config, device)
    prompt = torch.randint(config.vocab_size, (2, 9), device=device)
    tokens = generate(model, prompt, 20)
    return torch.equal(model(tokens).argmax(-1)[:, 8:-1], tokens[:, 9:])


@torch.no_grad()
def _survives_saving(config: GPTConfig, device: torch.device) -> bool:
    """Saved in Hugging Face layout and loaded again, all weights are the same bits."""
    model = _model(config, device)
    with tempfile.TemporaryDirectory() as parent:
        save_pretrained(model, Path(parent) / "model")
        loaded = load_pretrained(Path(parent) / "model", device=device).state_dict()
    return all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


if __name__ == "__main__":
    sys.exit(main())
