"""Reading a Hugging Face config strictly: which fields matter, which do not, and what to say of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.gpt.config import GPTConfig

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that any transformers config may carry and that do not change the logits: bookkeeping, what to
# return, settings of the generation loop that transformers 4 kept here, and what training tools leave behind; some are
# of transformers 2 and 3, whose files are still those of well-known models.
INERT_FIELDS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_flash_attn_2_enabled", "_name_or_path", "_num_labels", "architectures", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size", "custom_pipelines",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_ids", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "language", "length_penalty", "max_length", "max_sequence_length",
    "min_length", "model_type", "name", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_scores", "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache", "xla_device",
})  # fmt: skip


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for a field that nobody has looked at: it might change what the model computes."""
    for name in fields:
        if name in known or name in INERT_FIELDS:
            continue
        if name in ("quantization_config", "quantization"):
            raise unsupported(name, fields[name], "weights in floating point, not quantised")
        raise bad_argument(
            f"config field {name!r}",
            repr(fields[name]),
            f"a field of a {fields['model_type']!r} config{did_you_mean(name, known)}",
            f"correct {name!r}, or remove it if it does not change the model",
        )


def require(fields: Mapping[str, Any], name: str, value: object, why: str) -> None:
    """Raise ValueError unless the field is absent or has this value, the only one that the model has."""
    if fields.get(name, value) != value:
        raise unsupported(name, fields[name], f"{value!r}, because {why}")


def unsupported(name: str, got: object, expected: str) -> ValueError:
    """The error for a field whose value asks for something that the model does not have."""
    return bad_argument(
        f"config field {name!r}", repr(got), expected, "use a checkpoint that does not need it"
    )


def token_ids_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens as GPTConfig's fields. Ids outside the vocabulary never occur and become None."""
    vocabulary = range(values["vocab_size"]) if isinstance(values["vocab_size"], int) else ()
    ids: dict[str, Any] = {}
    for name in TOKEN_FIELDS:
        value = values[name]
        if isinstance(value, list):
            ids[name] = tuple(token for token in value if token in vocabulary) or None
        else:
            ids[name] = value if value in vocabulary else None
    return ids


# transformers has several names for one function.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
PLAIN_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
ENCODER_ACTIVATIONS = {**PLAIN_ACTIVATIONS, "silu": "silu"}


def activation_from(values: Mapping[str, Any], name: str) -> str:
    """Our name of the activation in this field; ValueError for one that the plain MLP of decoders does not have."""
    return _activation(values, name, _ACTIVATIONS)


def encoder_activation_from(values: Mapping[str, Any], name: str) -> str:
    """The same for BERT and ViT, which have another one."""
    return _activation(values, name, {**_ACTIVATIONS, "silu": "silu", "swish": "silu"})


def _activation(values: Mapping[str, Any], name: str, known: Mapping[str, str]) -> str:
    if values[name] not in known:
        raise unsupported(name, values[name], f"one of {', '.join(known)}")
    return known[values[name]]


def embedding_dropout_from(values: Mapping[str, Any], embedding: str, residual: str) -> float | None:
    """None, "the same", rather than the value that the dropout of branches has too."""
    return None if values[embedding] == values[residual] else values[embedding]


# What every family can express (or, as for dropout and the precision of the residual stream, leave out: the model is
# the same).
_EVERYWHERE = frozenset({
    "vocab_size", "max_seqlen", "n_layer", "n_head", "d_model", "d_inner", "norm_eps", "dropout",
    "embedding_dropout", "attn_dropout", "residual_in_fp32", "initializer_range", *TOKEN_FIELDS,
})  # fmt: skip


def find_obstacles(
    config: GPTConfig,
    *,
    fixed: Mapping[str, object],
    free: Collection[str],
    checks: Mapping[str, tuple[bool, str]],
) -> dict[str, str]:
    """The fields in which a config is not of a family, each with what the family has instead.

    Args:
        fixed: fields of which the family has one value, other than GPTConfig's default.
        free: fields of which it has every value. A field neither here nor in ``fixed`` must have the default.
        checks: more conditions, by field: whether the config meets it, and its wording.
    """
    obstacles = {name: expected for name, (fits, expected) in checks.items() if not fits}
    # These may be spelt out and still have the default's value.
    resolved = {
        "n_head_kv": (config.num_heads_kv == config.n_head, "n_head"),
        "d_head": (config.head_dim * config.n_head == config.d_model, "d_model / n_head"),
        "rotary_dim": (config.num_rotary_dims in (0, config.head_dim), "the head dimension"),
        "softmax_scale": (config.softmax_scale in (None, config.head_dim**-0.5), "1 / sqrt(head dimension)"),
    }
    for field in dataclasses.fields(config):
        name = field.name
        if name in _EVERYWHERE or name in free or name in obstacles:
            continue
        value = fixed.get(name, field.default)
        fits, expected = getattr(config, name) == value, repr(value)
        if name in resolved and name not in fixed:
            fits, expected = resolved[name]
        if not fits:
            obstacles[name] = expected
    return obstacles
