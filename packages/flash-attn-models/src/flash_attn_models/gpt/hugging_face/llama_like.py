"""Hugging Face's LLaMA and the families of its shape (Mistral, Qwen2, Qwen3): configs and tensor names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face.config_fields import (
    TOKEN_FIELDS,
    find_obstacles,
    refuse_unknown,
    require,
    token_ids_from,
    unsupported,
)
from flash_attn_models.gpt.hugging_face.rope import ROPE_FIELDS, rope_checks, rope_from, rope_to
from flash_attn_models.gpt.hugging_face.state_dict import (
    Layout,
    layer_entries,
    linear_entries,
    make_layout,
)

# What transformers assumes for a field that config.json leaves out, in most of these families.
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
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
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
    "tie_word_embeddings": "tie_embeddings",
    "attention_dropout": "attn_dropout",
    "initializer_range": "initializer_range",
}
# pretraining_tp splits matrix products into parts without changing their value; is_llama_config tells the tool that
# trained SmolLM what kind of config it has.
_INERT = {"pretraining_tp", "is_llama_config"}
_REQUIRED = {
    "add_cross_attention": (False, "this is a decoder without an encoder"),
    "use_mrope": (False, "positions have one dimension"),
    "rope_interleaved": (False, "the first halves of heads rotate with the second ones"),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LlamaLike:
    """One family: RMS norms, rotary positions, a SwiGLU MLP, and what differs.

    Attributes:
        model_type, architecture: names in ``config.json``.
        defaults: of the fields; those that it lacks are no fields of the family.
        fixed: fields of GPTConfig that have one value here.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]

    def config_from(self, fields: Mapping[str, Any]) -> GPTConfig:
        """The GPTConfig of the contents of ``config.json``; ValueError naming what it cannot express."""
        refuse_unknown(fields, {*self.defaults, *ROPE_FIELDS, *_INERT, *_REQUIRED})
        for name, (value, why) in _REQUIRED.items():
            require(fields, name, value, why)
        values = {**self.defaults, **fields}
        if values["hidden_act"] not in ("silu", "swish"):
            raise unsupported("hidden_act", values["hidden_act"], "'silu', the gate of the MLP")
        if values["attention_dropout"] is None:
            values["attention_dropout"] = 0.0
        rope = rope_from(fields, values["max_position_embeddings"])
        options = dict(self.fixed)
        if "attention_bias" in self.defaults:
            options |= {"qkv_bias": values["attention_bias"], "out_bias": values["attention_bias"]}
        if "mlp_bias" in self.defaults:
            options["mlp_bias"] = values["mlp_bias"]
        return GPTConfig(
            **{ours: values[theirs] for theirs, ours in self._fields().items()},
            **token_ids_from(values),
            **self._window_from(values),
            **options,
            rotary_base=rope.base,
            rotary_scaling=rope.scaling,
        )

    def config_to(self, config: GPTConfig) -> dict[str, Any]:
        """The contents of ``config.json`` for a config without ``obstacles``."""
        plain = config.to_dict()
        fields = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs: plain[ours] for theirs, ours in self._fields().items()},
            **{name: plain[name] for name in TOKEN_FIELDS},
            # What is None in ours would be something else in transformers.
            "num_key_value_heads": config.num_heads_kv,
            "intermediate_size": config.inner_dim,
            "hidden_act": "silu",
            **rope_to(config),
        }
        if "head_dim" in self.defaults:
            fields["head_dim"] = config.head_dim
        if "attention_bias" in self.defaults:
            fields["attention_bias"] = config.qkv_bias
        if "mlp_bias" in self.defaults:
            fields["mlp_bias"] = config.mlp_bias
        if "sliding_window" in self.defaults:
            fields["sliding_window"] = config.window
        if "use_sliding_window" in self.defaults:
            fields["use_sliding_window"] = config.window is not None
            kinds = [config.window_of(layer) is not None for layer in range(config.n_layer)]
            fields["max_window_layers"] = kinds.index(True) if any(kinds) else config.n_layer
            if config.window_layers is not None:
                fields["layer_types"] = [_SLIDING if has_window else _FULL for has_window in kinds]
        return fields

    def obstacles(self, config: GPTConfig) -> dict[str, str]:
        """The fields that keep a config from being of this family, each with what the family has instead."""
        free = {"n_head_kv", "tie_embeddings", "rotary_base", "rotary_scaling"}
        checks = rope_checks(config)
        checks["n_head"] = config.d_model % config.n_head == 0, "a divisor of d_model"
        if "head_dim" in self.defaults:
            free.add("d_head")
        if "attention_bias" in self.defaults:
            free |= {"qkv_bias", "out_bias"}
            checks["out_bias"] = config.out_bias == config.qkv_bias, "the same as qkv_bias"
        if "mlp_bias" in self.defaults:
            free.add("mlp_bias")
        if "sliding_window" in self.defaults:
            free.add("window")
        if "use_sliding_window" in self.defaults:
            free |= {"window_first_layer", "window_layers"}
        return find_obstacles(config, fixed=self.fixed, free=free, checks=checks)

    def layout(self, config: GPTConfig) -> Layout:
        """The tensors of a checkpoint. Our projections hold several of theirs, one below the other."""
        q_rows, kv_rows = config.n_head * config.head_dim, config.num_heads_kv * config.head_dim
        qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
        norms = [
            *linear_entries("mixer.q_norm", "self_attn.q_norm", False),
            *linear_entries("mixer.k_norm", "self_attn.k_norm", False),
        ]
        per_layer = [
            *linear_entries("norm1", "input_layernorm", False),
            *linear_entries("mixer.Wqkv", qkv, config.qkv_bias, rows=(q_rows, kv_rows, kv_rows)),
            *(norms if config.qk_norm else []),
            *linear_entries("mixer.out_proj", "self_attn.o_proj", config.out_bias),
            *linear_entries("norm2", "post_attention_layernorm", False),
            *linear_entries(
                "mlp.fc1", ("mlp.up_proj", "mlp.gate_proj"), config.mlp_bias, rows=(config.inner_dim,) * 2
            ),
            *linear_entries("mlp.fc2", "mlp.down_proj", config.mlp_bias),
        ]
        entries = [
            *linear_entries("transformer.embeddings.word_embeddings", "model.embed_tokens", False),
            *layer_entries(per_layer, config.n_layer, "model.layers"),
            *linear_entries("transformer.ln_f", "model.norm", False),
        ]
        return make_layout(
            config, entries, "model.", r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        )

    def _fields(self) -> dict[str, str]:
        return {theirs: ours for theirs, ours in _FIELDS.items() if theirs in self.defaults}

    def _window_from(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The window, and the layers that have it: all in Mistral; in Qwen those that ``layer_types`` names, or the
        upper ones."""
        if "sliding_window" not in self.defaults:
            return {}
        n_layer, window, kinds = (
            values[name] for name in ("num_hidden_layers", "sliding_window", "layer_types")
        )
        if "use_sliding_window" not in self.defaults:
            # transformers does not read layer_types here, but says that another class does.
            only = _FULL if window is None else _SLIDING
            if kinds is not None and kinds != [only] * n_layer:
                raise unsupported(
                    "layer_types", kinds, f"{only!r} in all layers, since Mistral has one attention"
                )
            return {"window": window}
        if not values["use_sliding_window"]:
            window = None
        if kinds is None:
            first = values["max_window_layers"]
            return (
                {} if window is None or first >= n_layer else {"window": window, "window_first_layer": first}
            )
        known = (_FULL,) if window is None else (_FULL, _SLIDING)
        if (
            not isinstance(kinds, (list, tuple))
            or len(kinds) != n_layer
            or not all(k in known for k in kinds)
        ):
            raise unsupported(
                "layer_types",
                kinds,
                f"one of {_FULL!r} and, with use_sliding_window and a sliding_window, {_SLIDING!r} for each of"
                f" {n_layer} layers",
            )
        if _SLIDING not in kinds:
            return {}
        return {"window": window, "window_layers": tuple(kind == _SLIDING for kind in kinds)}


_COMMON = {"activation": "swiglu", "norm": "rms_norm", "position": "rotary"}
_NO_MLP_BIAS = {**_COMMON, "mlp_bias": False}

llama = LlamaLike(
    "llama",
    "LlamaForCausalLM",
    {**_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    _COMMON,
)
mistral = LlamaLike(
    "mistral",
    "MistralForCausalLM",
    {
        **_DEFAULTS,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "layer_types": None,
    },
    {**_NO_MLP_BIAS, "qkv_bias": False, "out_bias": False},
)
qwen2 = LlamaLike(
    "qwen2",
    "Qwen2ForCausalLM",
    {name: value for name, value in _QWEN_DEFAULTS.items() if name != "head_dim"},
    {**_NO_MLP_BIAS, "qkv_bias": True, "out_bias": False},
)
qwen3 = LlamaLike(
    "qwen3",
    "Qwen3ForCausalLM",
    {**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    {**_NO_MLP_BIAS, "qk_norm": True},
)
