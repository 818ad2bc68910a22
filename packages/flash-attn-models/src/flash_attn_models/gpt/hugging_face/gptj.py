"""Hugging Face's GPT-J: its config and its tensor names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    PLAIN_ACTIVATIONS,
    TOKEN_FIELDS,
    activation_from,
    embedding_dropout_from,
    find_obstacles,
    refuse_unknown,
    require,
    token_ids_from,
    unsupported,
)
from flash_attn_models.gpt.hugging_face.state_dict import (
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_layer": 28,
    "n_head": 16,
    "n_embd": 4096,
    "n_inner": None,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "max_seqlen",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "n_inner": "d_inner",
    "rotary_dim": "rotary_dim",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attn_dropout",
    "initializer_range": "initializer_range",
}
_FIXED: dict[str, Any] = {
    "position": "rotary",
    "rotary_interleaved": True,
    "parallel_block": True,
    "tied_norm": True,
    "qkv_bias": False,
    "out_bias": False,
    "head_bias": True,
}
_REQUIRED = {
    "rotary": (True, "positions are rotary"),
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(head dimension)"),
}
# The summary fields shape a classification head.
_INERT = {
    "n_ctx",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a GPT-J ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    if values["rotary_dim"] is None:
        raise unsupported("rotary_dim", None, "the number of dimensions of a head that rotate")
    values["embd_pdrop"] = embedding_dropout_from(values, "embd_pdrop", "resid_pdrop")
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        **_FIXED,
        activation=activation_from(values, "activation_function"),
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "rotary_dim": config.num_rotary_dims,
        "embd_pdrop": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        "activation_function": PLAIN_ACTIVATIONS[config.activation],
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a GPT-J, each with what GPT-J has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed=_FIXED,
        free={"activation", "rotary_dim", "tie_embeddings"},
        checks={"activation": (config.activation in PLAIN_ACTIVATIONS, activations)},
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a GPT-J checkpoint."""
    qkv = tuple(f"attn.{name}_proj" for name in "qkv")
    per_layer = [
        *linear_entries("norm1", "ln_1", True),
        *linear_entries("mixer.Wqkv", qkv, False, rows=(config.d_model,) * 3),
        *linear_entries("mixer.out_proj", "attn.out_proj", False),
        *linear_entries("mlp.fc1", "mlp.fc_in", True),
        *linear_entries("mlp.fc2", "mlp.fc_out", True),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "transformer.wte", False),
        *layer_entries(per_layer, config.n_layer, "transformer.h"),
        *linear_entries("transformer.ln_f", "transformer.ln_f", True),
    ]
    return make_layout(config, entries, "transformer.", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
