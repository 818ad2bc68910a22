"""Reading a Hugging Face config strictly: which fields matter, which do not, and what to say of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flash_attn_models.errors import bad_argument, did_you_mean

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that any transformers config may carry and that do not change the logits: bookkeeping, what to
# return, and settings of the generation loop that transformers 4 kept here.
INERT_FIELDS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path",
    "architectures", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache",
})  # fmt: skip


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for a field that nobody has looked at: it might change what the model computes."""
    for name in fields:
        if name in known or name in INERT_FIELDS:
            continue
        if name == "quantization_config":
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
