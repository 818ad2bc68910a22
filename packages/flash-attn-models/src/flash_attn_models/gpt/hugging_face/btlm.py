"""Cerebras' BTLM: config and tensor names, both ways. transformers has no class of its own for it, but runs the code
that comes with its folder.

It is trained with muP (Yang et al. 2021, arXiv 2203.03466): factors of the embedding and of the logits, and scores
divided by the head width instead of its root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    TOKEN_FIELDS,
    embedding_dropout_from,
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

# What the model's code assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0,
    "mup_width_scale": 1.0,
    "mup_scale_qk_dot_by_d": False,
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
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attn_dropout",
    "initializer_range": "initializer_range",
    "mup_embeddings_scale": "embedding_scale",
}
_REQUIRED = {
    "activation_function": ("swiglu", "the MLP is gated"),
    "position_embedding_type": ("alibi", "positions are ALiBi"),
    "scale_attn_weights": (True, "attention scores are always scaled"),
    "scale_attn_by_inverse_layer_idx": (False, "the scale of attention is the same in all layers"),
    "add_cross_attention": (False, "this is a decoder without an encoder"),
    "alibi_scaling": (None, "ALiBi is not rescaled"),
}
_INERT = {"n_ctx", "reorder_and_upcast_attn"}


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of the contents of a BTLM ``config.json``; ValueError naming what it cannot express."""
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    values["embd_pdrop"] = embedding_dropout_from(values, "embd_pdrop", "resid_pdrop")
    width = values["n_embd"] // values["n_head"]
    return GPTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        activation="swiglu",
        position="alibi",
        d_inner=4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"],
        logit_scale=values["mup_output_alpha"] * values["mup_width_scale"],
        softmax_scale=1.0 / width if values["mup_scale_qk_dot_by_d"] else None,
    )


def config_to(config: GPTConfig) -> dict[str, Any]:
    """The contents of ``config.json`` for a config without ``obstacles``. Of the two factors of the logits, the width's
    (which sets learning rates too) is 1."""
    plain = config.to_dict()
    return {
        "architectures": ["BTLMLMHeadModel"],
        "model_type": "btlm",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "n_inner": config.inner_dim,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "embd_pdrop": config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        "mup_output_alpha": config.logit_scale,
        "mup_width_scale": 1.0,
        "mup_scale_qk_dot_by_d": config.softmax_scale is not None,
    }


def obstacles(config: GPTConfig) -> dict[str, str]:
    """The fields that keep a config from being a BTLM, each with what BTLM has instead."""
    return find_obstacles(
        config,
        fixed={"activation": "swiglu", "position": "alibi"},
        free={"tie_embeddings", "embedding_scale", "logit_scale", "softmax_scale"},
        checks={
            "softmax_scale": (
                config.softmax_scale in (None, 1.0 / config.head_dim),
                f"None, or 1 / head width ({1.0 / config.head_dim})",
            )
        },
    )


def layout(config: GPTConfig) -> Layout:
    """The tensors of a BTLM checkpoint. Projections are (in, out), the transpose of nn.Linear's weight."""
    value_and_gate = ("mlp.c_fc", "mlp.c_fc2")
    per_layer = [
        *linear_entries("norm1", "ln_1", True),
        *linear_entries("mixer.Wqkv", "attn.c_attn", True, transposed=True),
        *linear_entries("mixer.out_proj", "attn.c_proj", True, transposed=True),
        *linear_entries("norm2", "ln_2", True),
        *linear_entries("mlp.fc1", value_and_gate, True, transposed=True, rows=(config.inner_dim,) * 2),
        *linear_entries("mlp.fc2", "mlp.c_proj", True, transposed=True),
    ]
    entries = [
        *linear_entries("transformer.embeddings.word_embeddings", "transformer.wte", False),
        *layer_entries(per_layer, config.n_layer, "transformer.h"),
        *linear_entries("transformer.ln_f", "transformer.ln_f", True),
    ]
    buffers = r"(transformer\.)?(h\.\d+\.attn\.(bias|masked_bias)|relative_pe\.slopes)"
    return make_layout(config, entries, "transformer.", buffers)
