"""Hugging Face's BERT config, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.hugging_face.config_fields import (
    ENCODER_ACTIVATIONS,
    TOKEN_FIELDS,
    encoder_activation_from,
    refuse_unknown,
    require,
    token_ids_from,
)

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seqlen",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "type_vocab_size": "n_token_types",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attn_dropout",
    "initializer_range": "initializer_range",
}
_REQUIRED = {
    "position_embedding_type": ("absolute", "positions are learned and added to the embedding"),
    "is_decoder": (False, "every token of an encoder sees its whole sequence"),
    "add_cross_attention": (False, "this is an encoder"),
    "tie_word_embeddings": (True, "the masked-LM head is the word embedding"),
}
# The first belongs to a classification head; the others shape a head of the original code that transformers lacks.
_INERT = {
    "classifier_dropout",
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
}


def config_from_hugging_face(fields: Mapping[str, Any]) -> BertConfig:
    """The BertConfig of a Hugging Face model, given the contents of its ``config.json``.

    Every field is translated, or known not to change what the model computes, or refused: ValueError with its
    name and the reason.
    """
    if fields.get("model_type") != "bert":
        raise bad_argument(
            "config field 'model_type'", repr(fields.get("model_type")), "'bert'", "use a BERT model"
        )
    refuse_unknown(fields, {*_DEFAULTS, *_REQUIRED, *_INERT})
    for name, (value, why) in _REQUIRED.items():
        require(fields, name, value, why)
    values = {**_DEFAULTS, **fields}
    return BertConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **token_ids_from(values),
        activation=encoder_activation_from(values, "hidden_act"),
    )


def config_to_hugging_face(config: BertConfig, architecture: str = "BertModel") -> dict[str, Any]:
    """The contents of a ``config.json`` from which transformers builds the same model.

    ``architecture`` is the class that the weights are of: "BertModel", "BertForMaskedLM" or "BertForPreTraining".
    """
    plain = config.to_dict()
    return {
        "architectures": [architecture],
        "model_type": "bert",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        **{name: plain[name] for name in TOKEN_FIELDS},
        "intermediate_size": config.inner_dim,
        "hidden_act": ENCODER_ACTIVATIONS[config.activation],
        "position_embedding_type": "absolute",
    }
