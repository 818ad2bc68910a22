"""Hugging Face's Falcon (7B, 40B, 180B, RW, Falcon 2): its config and its tensor names, both ways."""

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
    unsupported,
)
from flash_attn_models.gpt.hugging_face.rope import ROPE_FIELDS, rope_checks, rope_from, rope_to
from flash_attn_models.gpt.hugging_face.state_dict import (
    Interleaved,
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65024,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": None,
    "hidden_size": 4544,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "layer_norm_epsilon": 1e-5,
    "num_ln_in_parallel_attn": None,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "tie_word_embeddings": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "pad_token_id": None,
}
_INERT = {"ff_factor"}  # of Falcon 2, and the ratio that ffn_hidden_size has; transformers does not read it
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seqlen",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "ffn_hidden_size": "d_inner",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "hidden_dropout": "dropout",
    "attention_dropout": "attn_dropout",
    "initializer_range": "initializer_range",
}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a Falcon ``config.json``; ValueError naming what it cannot express.

    transformers rounds the ALiBi of Falcon-RW to bfloat16 even in fp32 models; here it is exact.
    """
    refuse_unknown(fields, {*_DEFAULTS, *ROPE_FIELDS, *_INERT, "apply_residual_connection_post_layernorm"})
    require(
        fields,
        "apply_residual_connection_post_layernorm",
        False,
        "the residual stream is what comes before a norm",
    )
    values = {**_DEFAULTS, **fields}
    options: dict[str, Any] = {}
    if values["alibi"]:
        options |= {"position": "alibi", "alibi_scaled": True}
    else:
        rope = rope_from(fields, values["max_position_embeddings"])
        options |= {"position": "rotary", "rotary_base": rope.base, "rotary_scaling": rope.scaling}
    bias = values["bias"]
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        **options,
        **_structure_from(values),
        activation=activation_from(values, "activation"),
        embedding_dropout=0.0,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def _structure_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key/value heads, order of the branches, and their norms, which follow from four fields together."""
    norms, kv_heads, n_head = (
        values[name] for name in ("num_ln_in_parallel_attn", "num_kv_heads", "num_attention_heads")
    )
    if values["new_decoder_architecture"]:
        if not values["parallel_attn"]:
            raise unsupported("parallel_attn", False, "True with new_decoder_architecture")
        if norms not in (None, 1, 2):
            raise unsupported("num_ln_in_parallel_attn", norms, "1 or 2")
        return {
            "n_head_kv": n_head if kv_heads is None else kv_heads,
            "parallel_block": True,
            "tied_norm": norms == 1,
        }
    if norms not in (None, 1):
        raise unsupported("num_ln_in_parallel_attn", norms, "1 without new_decoder_architecture")
    if not values["multi_query"] and kv_heads not in (None, n_head):
        raise unsupported(
            "num_kv_heads", kv_heads, f"{n_head} without multi_query and new_decoder_architecture"
        )
    parallel = values["parallel_attn"]
    return {
        "n_head_kv": 1 if values["multi_query"] else n_head,
        "parallel_block": parallel,
        "tied_norm": parallel,
    }


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    new = config.parallel_block and (not config.tied_norm or config.num_heads_kv not in (1, config.n_head))
    fields = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "ffn_hidden_size": config.inner_dim,
        "activation": PLAIN_ACTIVATIONS[config.activation],
        "bias": config.qkv_bias,
        "alibi": config.position == "alibi",
        "parallel_attn": config.parallel_block,
        "new_decoder_architecture": new,
        "multi_query": not new and config.num_heads_kv == 1,
        "num_kv_heads": config.num_heads_kv if new else config.n_head,
        "num_ln_in_parallel_attn": (1 if config.tied_norm else 2) if new else None,
    }
    return {**fields, **rope_to(config)} if config.position == "rotary" else fields


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a Falcon, each with what Falcon has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed={},
        free={
            *("activation", "position", "rotary_base", "rotary_scaling", "alibi_scaled", "n_head_kv"),
            *("parallel_block", "tied_norm", "tie_embeddings", "qkv_bias", "out_bias", "mlp_bias"),
        },
        checks={
            **rope_checks(config),
            "activation": (config.activation in PLAIN_ACTIVATIONS, activations),
            "position": (config.position in ("rotary", "alibi"), "'rotary' or 'alibi'"),
            "alibi_scaled": (config.alibi_scaled == (config.position == "alibi"), "True with ALiBi"),
            "out_bias": (config.out_bias == config.qkv_bias, "the same as qkv_bias"),
            "mlp_bias": (config.mlp_bias == config.qkv_bias, "the same as qkv_bias"),
            "n_head_kv": (
                config.parallel_block or config.num_heads_kv in (1, config.n_head),
                "1 or n_head without parallel_block",
            ),
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a Falcon checkpoint. Each key/value head is together with its query heads."""
    if not config.parallel_block:
        norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    elif config.tied_norm:
        norms = {"norm1": "input_layernorm"}
    else:
        norms = {"norm1": "ln_attn", "norm2": "ln_mlp"}
    heads, attention = Interleaved.of(config), "self_attention"
    per_layer = [
        *(entry for ours, theirs in norms.items() for entry in linear_entries(ours, theirs, True)),
        *linear_entries("mixer.Wqkv", f"{attention}.query_key_value", config.qkv_bias, interleaved=heads),
        *linear_entries("mixer.out_proj", f"{attention}.dense", config.out_bias),
        *linear_entries("mlp.fc1", "mlp.dense_h_to_4h", config.mlp_bias),
        *linear_entries("mlp.fc2", "mlp.dense_4h_to_h", config.mlp_bias),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "transformer.word_embeddings", False),
        *layer_entries(per_layer, config.n_layer, "transformer.h"),
        *linear_entries("transformer.ln_f", "transformer.ln_f", True),
    ]
    buffers = r"(transformer\.)?h\.\d+\.self_attention\.(maybe_rotary|rotary|rotary_emb)\.inv_freq"
    return make_layout(config, entries, "transformer.", buffers)
