"""Hugging Face's GPT-2: its config and its tensor names, both ways."""

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
from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout, layer_entries, make_layout

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_by_inverse_layer_idx": False,
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
    "scale_attn_by_inverse_layer_idx": "softmax_scale_by_layer",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attn_dropout",
    "initializer_range": "initializer_range",
}
_REQUIRED = {
    "scale_attn_weights": (True, "attention scores are always divided by sqrt(head dimension)"),
    "add_cross_attention": (False, "this is a decoder without an encoder"),
}
# n_ctx repeats n_positions; reorder_and_upcast_attn asks for the fp32 softmax that our attention always has;
# the summary fields shape a classification head; n_special and predict_special_tokens are of the first GPT, and GPT-2
# has never read them.
_INERT = {
    "n_ctx",
    "n_special",
    "predict_special_tokens",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a GPT-2 ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    values["embd_pdrop"] = embedding_dropout_from(values, "embd_pdrop", "resid_pdrop")
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        activation=activation_from(values, "activation_function"),
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "embd_pdrop": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        "activation_function": PLAIN_ACTIVATIONS[config.activation],
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a GPT-2, each with what GPT-2 has instead."""
    activations = f"one of {', '.join(PLAIN_ACTIVATIONS)}"
    return find_obstacles(
        config,
        fixed={},
        free={"activation", "tie_embeddings", "softmax_scale_by_layer"},
        checks={"activation": (config.activation in PLAIN_ACTIVATIONS, activations)},
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a GPT-2 checkpoint. Projections are (in, out), the transpose of nn.Linear's weight."""
    per_layer = [
        Entry("norm1.weight", ("ln_1.weight",)),
        Entry("norm1.bias", ("ln_1.bias",)),
        Entry("mixer.Wqkv.weight", ("attn.c_attn.weight",), transposed=True),
        Entry("mixer.Wqkv.bias", ("attn.c_attn.bias",)),
        Entry("mixer.out_proj.weight", ("attn.c_proj.weight",), transposed=True),
        Entry("mixer.out_proj.bias", ("attn.c_proj.bias",)),
        Entry("norm2.weight", ("ln_2.weight",)),
        Entry("norm2.bias", ("ln_2.bias",)),
        Entry("mlp.fc1.weight", ("mlp.c_fc.weight",), transposed=True),
        Entry("mlp.fc1.bias", ("mlp.c_fc.bias",)),
        Entry("mlp.fc2.weight", ("mlp.c_proj.weight",), transposed=True),
        Entry("mlp.fc2.bias", ("mlp.c_proj.bias",)),
    ]
    entries = [
        Entry("transformer.embeddings.word_embeddings.weight", ("transformer.wte.weight",)),
        Entry("transformer.embeddings.position_embeddings.weight", ("transformer.wpe.weight",)),
        *layer_entries(per_layer, config.n_layer, "transformer.h"),
        Entry("transformer.ln_f.weight", ("transformer.ln_f.weight",)),
        Entry("transformer.ln_f.bias", ("transformer.ln_f.bias",)),
    ]
    return make_layout(config, entries, "transformer.", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
