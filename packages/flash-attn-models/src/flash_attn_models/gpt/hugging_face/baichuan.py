"""Baichuan 1 and 2: config and tensor names, both ways. transformers has no class of its own for it, but runs the code
that comes with its folders.

Two things are not said in ``config.json`` but by that code. The 13B models have ALiBi: theirs is the config without
``max_position_embeddings``. Baichuan 2 normalises the rows of its head: its config has ``z_loss_weight``, and its
vocabulary a size that no other has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    TOKEN_FIELDS,
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

# What the models' code assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 64000,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
}
_FIXED: dict[str, Any] = {
    "activation": "swiglu",
    "norm": "rms_norm",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}
_MAX_LENGTH = 4096
_VERSION_2_VOCABULARY = 125696
_INERT = {"_from_model_config", "user_token_id", "assistant_token_id"}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a Baichuan ``config.json``; ValueError naming what it cannot express."""
    known = {
        *_DEFAULTS,
        *_INERT,
        "hidden_act",
        "max_position_embeddings",
        "model_max_length",
        "z_loss_weight",
    }
    refuse_unknown(fields, known)
    require(fields, "hidden_act", "silu", "the gate of the MLP is")
    values = {**_DEFAULTS, **fields}
    rotary = "max_position_embeddings" in fields
    length_field = "max_position_embeddings" if rotary else "model_max_length"
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        **_FIXED,
        max_seqlen=fields.get(length_field, _MAX_LENGTH),
        position="rotary" if rotary else "alibi",
        normalize_head="z_loss_weight" in fields or values["vocab_size"] == _VERSION_2_VOCABULARY,
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    fields = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "intermediate_size": config.inner_dim,
        "hidden_act": "silu",
        "model_max_length": config.max_seqlen,
    }
    if config.position == "rotary":
        fields["max_position_embeddings"] = config.max_seqlen
    if config.normalize_head:
        fields["z_loss_weight"] = 0
    return fields


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a Baichuan, each with what Baichuan has instead."""
    return find_obstacles(
        config,
        fixed=_FIXED,
        free={"position", "normalize_head", "tie_embeddings"},
        checks={
            "position": (config.position in ("rotary", "alibi"), "'rotary' or 'alibi'"),
            "normalize_head": (
                config.normalize_head or config.vocab_size != _VERSION_2_VOCABULARY,
                f"True with vocab_size={_VERSION_2_VOCABULARY}",
            ),
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a Baichuan checkpoint."""
    value_and_gate = ("mlp.up_proj", "mlp.gate_proj")
    per_layer = [
        *linear_entries("norm1", "input_layernorm", False),
        *linear_entries("mixer.Wqkv", "self_attn.W_pack", False),
        *linear_entries("mixer.out_proj", "self_attn.o_proj", False),
        *linear_entries("norm2", "post_attention_layernorm", False),
        *linear_entries("mlp.fc1", value_and_gate, False, rows=(config.inner_dim,) * 2),
        *linear_entries("mlp.fc2", "mlp.down_proj", False),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "model.embed_tokens", False),
        *layer_entries(per_layer, config.n_layer, "model.layers"),
        *linear_entries("transformer.ln_f", "model.norm", False),
    ]
    buffers = r"(model\.)?(layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|future_mask|alibi_mask)"
    return make_layout(config, entries, "model.", buffers)
