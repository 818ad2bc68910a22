"""Hugging Face's GPTBigCode (SantaCoder, StarCoder): its config and its tensor names, both ways."""

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
)
from flash_attn_models.gpt.hugging_face.state_dict import (
    Interleaved,
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "multi_query": True,
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
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
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attn_dropout",
    "initializer_range": "initializer_range",
}
_ACTIVATIONS = {**PLAIN_ACTIVATIONS, "gelu_tanh": "gelu_pytorch_tanh"}  # its default's name
_REQUIRED = {
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(head dimension)"),
    "add_cross_attention": (False, "this is a decoder without an encoder"),
}
# n_ctx repeats n_positions, num_key_value_heads multi_query; the softmax is fp32 here whatever is asked for; the
# summary fields shape a classification head; the rest belongs to an inference loop of transformers 4.
_INERT = {
    *("n_ctx", "num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
    *("summary_use_proj", "inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length"),
    *("pre_allocate_kv_cache", "validate_runner_input"),
}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a GPTBigCode ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    values["embd_pdrop"] = embedding_dropout_from(values, "embd_pdrop", "resid_pdrop")
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        n_head_kv=1 if values["multi_query"] else None,
        activation=activation_from(values, "activation_function"),
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "multi_query": config.num_heads_kv == 1,
        "embd_pdrop": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        "activation_function": _ACTIVATIONS[config.activation],
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a GPTBigCode, each with what GPTBigCode has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed={},
        free={"activation", "tie_embeddings", "n_head_kv"},
        checks={
            "activation": (config.activation in PLAIN_ACTIVATIONS, activations),
            "n_head_kv": (config.num_heads_kv in (1, config.n_head), "1 or n_head"),
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a GPTBigCode checkpoint. Several key/value heads are together with their query heads."""
    heads = Interleaved.of(config)
    per_layer = [
        *linear_entries("norm1", "ln_1", True),
        *linear_entries("mixer.Wqkv", "attn.c_attn", True, interleaved=heads),
        *linear_entries("mixer.out_proj", "attn.c_proj", True),
        *linear_entries("norm2", "ln_2", True),
        *linear_entries("mlp.fc1", "mlp.c_fc", True),
        *linear_entries("mlp.fc2", "mlp.c_proj", True),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "transformer.wte", False),
        *linear_entries("transformer.embeddings.position_embeddings", "transformer.wpe", False),
        *layer_entries(per_layer, config.n_layer, "transformer.h"),
        *linear_entries("transformer.ln_f", "transformer.ln_f", True),
    ]
    return make_layout(config, entries, "transformer.", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
