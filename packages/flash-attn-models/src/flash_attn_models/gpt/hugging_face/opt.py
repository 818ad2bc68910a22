"""Hugging Face's OPT: its config and its tensor names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    PLAIN_ACTIVATIONS,
    TOKEN_FIELDS,
    activation_from,
    find_obstacles,
    refuse_unknown,
    require,
    token_ids_from,
)
from flash_attn_models.gpt.hugging_face.state_dict import (
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "word_embed_proj_dim": None,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "init_std": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seqlen",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "ffn_dim": "d_inner",
    "do_layer_norm_before": "prenorm",
    "tie_word_embeddings": "tie_embeddings",
    "dropout": "dropout",
    "attention_dropout": "attn_dropout",
    "init_std": "initializer_range",
}
_REQUIRED = {
    "layer_norm_elementwise_affine": (True, "norms have weights and biases"),
    "_remove_final_layer_norm": (False, "there is a norm after the last of pre-norm layers"),
    "layerdrop": (0.0, "no layer is left out in training"),
    # Of the code that Galactica was trained with; transformers reads neither.
    "learned_embeddings": (True, "positions are learned"),
    "scale_embeddings": (False, "the embedding has no factor"),
}
_INERT = {"activation_dropout"}  # transformers reads it nowhere
_POSITION_OFFSET = 2  # rows in front of position 0; the second is for padding
_NORM_EPS = 1e-5  # no field of theirs


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of an OPT ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    width = values["word_embed_proj_dim"]
    bias = values["enable_bias"]
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        position_offset=_POSITION_OFFSET,
        norm_eps=_NORM_EPS,
        d_embedding=None if width == values["hidden_size"] else width,
        activation=activation_from(values, "activation_function"),
        embedding_dropout=0.0,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "ffn_dim": config.inner_dim,
        "word_embed_proj_dim": config.embedding_dim,
        "activation_function": PLAIN_ACTIVATIONS[config.activation],
        "enable_bias": config.qkv_bias,
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being an OPT, each with what OPT has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed={"position_offset": _POSITION_OFFSET},
        free={"activation", "prenorm", "d_embedding", "tie_embeddings", "qkv_bias", "out_bias", "mlp_bias"},
        checks={
            "activation": (config.activation in PLAIN_ACTIVATIONS, activations),
            "norm_eps": (config.norm_eps == _NORM_EPS, str(_NORM_EPS)),
            "out_bias": (config.out_bias == config.qkv_bias, "the same as qkv_bias"),
            "mlp_bias": (config.mlp_bias == config.qkv_bias, "the same as qkv_bias"),
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of an OPT checkpoint."""
    qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
    per_layer = [
        *linear_entries("norm1", "self_attn_layer_norm", True),
        *linear_entries("mixer.Wqkv", qkv, config.qkv_bias, rows=(config.d_model,) * 3),
        *linear_entries("mixer.out_proj", "self_attn.out_proj", config.out_bias),
        *linear_entries("norm2", "final_layer_norm", True),
        *linear_entries("mlp.fc1", "fc1", config.mlp_bias),
        *linear_entries("mlp.fc2", "fc2", config.mlp_bias),
    ]
    decoder = "model.decoder"
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", f"{decoder}.embed_tokens", False),
        *linear_entries("transformer.embeddings.position_embeddings", f"{decoder}.embed_positions", False),
        *layer_entries(per_layer, config.n_layer, f"{decoder}.layers"),
    ]
    if config.d_embedding is not None:
        entries += linear_entries("transformer.embeddings.project_in", f"{decoder}.project_in", False)
        entries += linear_entries("project_out", f"{decoder}.project_out", False)
    if config.prenorm:
        entries += linear_entries("transformer.ln_f", f"{decoder}.final_layer_norm", True)
    return make_layout(config, entries, "model.", r"(model\.)?decoder\.version")
