"""Named starting points. A preset is a partial config; keys given by the user win over it."""

from __future__ import annotations

from typing import Any

# Whole runs: `preset=NAME`.
PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes on two CPU cores, from raw text to a sample. In so short a time a small model that sees many tokens
    # learns most. The head dimension is 64, so that the same preset runs through the CUDA kernels on a GPU.
    "quickstart": {
        "output_dir": "runs/quickstart",
        "tokenizer": {"vocab_size": 2048},
        "model": {
            "max_seqlen": 256,
            "n_layer": 4,
            "n_head": 2,
            "d_model": 128,
            "d_inner": 384,
            "tie_embeddings": True,
        },
        "optimizer": {"lr": 4e-3},
        "trainer": {"max_steps": 750, "batch_size": 8, "val_every_n_steps": 150},
        "checkpoint": {"every_n_steps": 150},
    },
    # Seconds: does everything once, learns little. For trying out an installation or a corpus.
    "smoke": {
        "output_dir": "runs/smoke",
        "tokenizer": {"vocab_size": 512},
        "model": {"max_seqlen": 64, "n_layer": 2, "n_head": 2, "d_model": 64},
        "trainer": {"max_steps": 20, "batch_size": 8, "val_every_n_steps": 10, "val_sequences": 32},
        "logging": {"every_n_steps": 5},
        "checkpoint": {"every_n_steps": 10},
        "generation": {"max_new_tokens": 40},
    },
}

# Architectures: `model=NAME`. Sizes are left to the preset and to the user.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "activation": "swiglu",
        "norm": "rms_norm",
        "position": "rotary",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tie_embeddings": False,
    },
    "gpt2": {
        "activation": "gelu_tanh",
        "norm": "layer_norm",
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
}
