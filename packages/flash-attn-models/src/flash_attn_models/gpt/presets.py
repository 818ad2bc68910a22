"""Sizes of GPT-2 and LLaMA as fields of ``GPTConfig``."""

from __future__ import annotations

from typing import Any

GPT2_COMMON: dict[str, Any] = {
    "vocab_size": 50257,
    "max_seqlen": 1024,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
GPT2_SIZES: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
}

LLAMA_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "activation": "swiglu",
    "norm": "rms_norm",
    "position": "rotary",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_SIZES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "max_seqlen": 2048,
        "n_layer": 22,
        "n_head": 32,
        "n_head_kv": 4,
        "d_model": 2048,
        "d_inner": 5632,
    },
    "llama2-7b": {"max_seqlen": 4096, "n_layer": 32, "n_head": 32, "d_model": 4096, "d_inner": 11008},
    "llama2-13b": {"max_seqlen": 4096, "n_layer": 40, "n_head": 40, "d_model": 5120, "d_inner": 13824},
    "llama3-8b": {
        "vocab_size": 128256,
        "max_seqlen": 8192,
        "n_layer": 32,
        "n_head": 32,
        "n_head_kv": 8,
        "d_model": 4096,
        "d_inner": 14336,
        "rotary_base": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
