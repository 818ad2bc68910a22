"""Hugging Face's LLaMA: its config and its tensor names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    TOKEN_FIELDS,
    refuse_unknown,
    require,
    token_ids_from,
    unsupported,
)
from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout, layer_entries, make_layout

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_size": 4096,
    "head_dim": None,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seqlen",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head_kv",
    "hidden_size": "d_model",
    "head_dim": "d_head",
    "intermediate_size": "d_inner",
    "rms_norm_eps": "norm_eps",
    "attention_bias": "qkv_bias",
    "mlp_bias": "mlp_bias",
    "tie_word_embeddings": "tie_embeddings",
    "attention_dropout": "attn_dropout",
    "initializer_range": "initializer_range",
}
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}
# pretraining_tp splits matrix products into parts without changing their value.
_INERT = {"pretraining_tp"}
_DEFAULT_ROTARY_BASE = 10000.0


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a LLaMA ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_ROPE_FIELDS, *_INERT, "add_cross_attention"})
    require(fields, "add_cross_attention", False, "this is a decoder without an encoder")
    values = {**_DEFAULTS, **fields}
    if values["hidden_act"] not in ("silu", "swish"):
        raise unsupported("hidden_act", values["hidden_act"], "'silu', the gate of the MLP")
    if values["attention_dropout"] is None:
        values["attention_dropout"] = 0.0
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        activation="swiglu",
        norm="rms_norm",
        position="rotary",
        rotary_base=_rotary_base(fields),
        out_bias=values["attention_bias"],
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``."""
    plain = config.to_dict()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        # What is None in ours would be something else in transformers.
        "num_key_value_heads": config.num_heads_kv,
        "head_dim": config.head_dim,
        "intermediate_size": config.inner_dim,
        "hidden_act": "silu",
        # The first is read by transformers 5, the second by 4.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "rope_theta": config.rotary_base,
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a LLaMA, each with what LLaMA has instead."""
    has = {
        "norm": (config.norm == "rms_norm", "'rms_norm'"),
        "position": (config.position == "rotary", "'rotary'"),
        "activation": (config.activation == "swiglu", "'swiglu'"),
        "rotary_interleaved": (not config.rotary_interleaved, "False"),
        "rotary_dim": (config.num_rotary_dims in (0, config.head_dim), "the head dimension"),
        "out_bias": (config.out_bias == config.qkv_bias, "the same as qkv_bias"),
        "n_head": (config.d_model % config.n_head == 0, "a divisor of d_model"),
    }
    return {name: expected for name, (fits, expected) in has.items() if not fits}


def layout(config: GPTConfig) -> Layout:
    """The tensors of a LLaMA checkpoint. Our projections hold several of theirs, one below the other."""
    q_rows, kv_rows = config.n_head * config.head_dim, config.num_heads_kv * config.head_dim
    per_layer = [
        Entry("norm1.weight", ("input_layernorm.weight",)),
        Entry("norm2.weight", ("post_attention_layernorm.weight",)),
    ]
    for kind in ("weight", "bias"):
        if kind == "weight" or config.qkv_bias:
            qkv = tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")
            per_layer += [
                Entry(f"mixer.Wqkv.{kind}", qkv, rows=(q_rows, kv_rows, kv_rows)),
                Entry(f"mixer.out_proj.{kind}", (f"self_attn.o_proj.{kind}",)),
            ]
        if kind == "weight" or config.mlp_bias:
            value_and_gate = (f"mlp.up_proj.{kind}", f"mlp.gate_proj.{kind}")
            per_layer += [
                Entry(f"mlp.fc1.{kind}", value_and_gate, rows=(config.inner_dim, config.inner_dim)),
                Entry(f"mlp.fc2.{kind}", (f"mlp.down_proj.{kind}",)),
            ]
    entries = [
        Entry("transformer.embeddings.word_embeddings.weight", ("model.embed_tokens.weight",)),
        *layer_entries(per_layer, config.n_layer, "model.layers"),
        Entry("transformer.ln_f.weight", ("model.norm.weight",)),
    ]
    return make_layout(
        config, entries, "model.", r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    )


def _rotary_base(fields: Mapping[str, Any]) -> float:
    """The base from ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5)."""
    base = fields.get("rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rope = dict(fields.get(field) or {})
        base = rope.pop("rope_theta", base)
        if {rope.pop("rope_type", "default"), rope.pop("type", "default")} != {"default"}:
            raise unsupported(
                field, fields[field], "rope_type 'default', because frequencies are not rescaled"
            )
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise unsupported(
                field, fields[field], "partial_rotary_factor 1.0, because LLaMA rotates whole heads"
            )
        if rope:
            raise unsupported(field, fields[field], f"only rope_theta and rope_type, not {', '.join(rope)}")
    return _DEFAULT_ROTARY_BASE if base is None else base
