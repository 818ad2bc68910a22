"""Hugging Face's GPT-NeoX (Pythia, RedPajama-INCITE): its config and its tensor names, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    PLAIN_ACTIVATIONS,
    TOKEN_FIELDS,
    activation_from,
    find_obstacles,
    refuse_unknown,
    token_ids_from,
)
from flash_attn_models.gpt.hugging_face.rope import ROPE_FIELDS, rope_checks, rope_from, rope_to, share_of
from flash_attn_models.gpt.hugging_face.state_dict import (
    Interleaved,
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seqlen",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "layer_norm_eps": "norm_eps",
    "use_parallel_residual": "parallel_block",
    "attention_bias": "qkv_bias",
    "tie_word_embeddings": "tie_embeddings",
    "hidden_dropout": "dropout",
    "attention_dropout": "attn_dropout",
    "initializer_range": "initializer_range",
}
# A classification head's dropout; one kernel that older versions had for the same function; names of dropouts that
# GPT-NeoX-20B's file has and nothing reads.
_INERT = {
    *("classifier_dropout", "gelu_fusion", "rotary_emb_base", "rotary_pct"),
    *("attention_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout_prob"),
}
_SHARE = 0.25


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a GPT-NeoX ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *ROPE_FIELDS, *_INERT})
    values = {**_DEFAULTS, **fields}
    base_field = "rotary_emb_base" if "rotary_emb_base" in fields else "rope_theta"
    rope = rope_from(
        fields,
        values["max_position_embeddings"],
        base_field=base_field,
        share_field="rotary_pct",
        share=_SHARE,
    )
    plain = GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        out_bias=values["attention_bias"],
        activation=activation_from(values, "hidden_act"),
        position="rotary",
        rotary_dim=None,
        rotary_base=rope.base,
        rotary_scaling=rope.scaling,
    )
    return dataclasses.replace(plain, rotary_dim=int(plain.head_dim * rope.share))


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "intermediate_size": config.inner_dim,
        "hidden_act": PLAIN_ACTIVATIONS[config.activation],
        **rope_to(config, share=True),
        # Of transformers 4.
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": share_of(config),
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a GPT-NeoX, each with what GPT-NeoX has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed={"position": "rotary"},
        free={
            *("activation", "parallel_block", "qkv_bias", "out_bias", "tie_embeddings"),
            *("rotary_dim", "rotary_base", "rotary_scaling"),
        },
        checks={
            **rope_checks(config),
            "activation": (config.activation in PLAIN_ACTIVATIONS, activations),
            "out_bias": (config.out_bias == config.qkv_bias, "the same as qkv_bias"),
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a GPT-NeoX checkpoint. Queries, keys and values of a head are together."""
    heads = Interleaved.of(config)
    per_layer = [
        *linear_entries("norm1", "input_layernorm", True),
        *linear_entries("mixer.Wqkv", "attention.query_key_value", config.qkv_bias, interleaved=heads),
        *linear_entries("mixer.out_proj", "attention.dense", config.out_bias),
        *linear_entries("norm2", "post_attention_layernorm", True),
        *linear_entries("mlp.fc1", "mlp.dense_h_to_4h", True),
        *linear_entries("mlp.fc2", "mlp.dense_4h_to_h", True),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "gpt_neox.embed_in", False),
        *layer_entries(per_layer, config.n_layer, "gpt_neox.layers"),
        *linear_entries("transformer.ln_f", "gpt_neox.final_layer_norm", True),
    ]
    return make_layout(
        config,
        entries,
        "gpt_neox.",
        r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        # Files have the first, modules of transformers 5 the second; transformers reads both.
        head="embed_out",
        other_head="lm_head",
    )
