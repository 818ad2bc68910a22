"""Hugging Face's ViT config, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.hugging_face.config_fields import (
    ENCODER_ACTIVATIONS,
    encoder_activation_from,
    refuse_unknown,
    require,
    unsupported,
)
from flash_attn_models.vit.config import ViTConfig

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
}
_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "n_channels",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "qkv_bias": "qkv_bias",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attn_dropout",
    "initializer_range": "initializer_range",
}
# Of the head for masked images, and how many labels there are, which id2label says too.
_INERT = {"encoder_stride", "num_labels"}
_N_LABELS = 2  # what transformers assumes


def config_from_hugging_face(fields: Mapping[str, Any]) -> ViTConfig:
    """The ViTConfig of a Hugging Face model, given the contents of its ``config.json``.

    Every field is translated, or known not to change what the model computes, or refused: ValueError with its
    name and the reason.
    """
    if fields.get("model_type") != "vit":
        raise bad_argument(
            "config field 'model_type'", repr(fields.get("model_type")), "'vit'", "use a ViT model"
        )
    refuse_unknown(fields, {*_DEFAULTS, "pooler_act", "pooler_output_size", "tie_word_embeddings", *_INERT})
    require(fields, "pooler_act", "tanh", "that is the pooler's activation")
    values = {**_DEFAULTS, **fields}
    if fields.get("pooler_output_size") not in (None, values["hidden_size"]):
        raise unsupported(
            "pooler_output_size", fields["pooler_output_size"], f"hidden_size={values['hidden_size']}"
        )
    return ViTConfig(
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        **_classes_from(fields),
        activation=encoder_activation_from(values, "hidden_act"),
    )


def config_to_hugging_face(config: ViTConfig, architecture: str = "ViTModel") -> dict[str, Any]:
    """The contents of a ``config.json`` from which transformers builds the same model.

    ``architecture`` is the class that the weights are of: "ViTModel" or "ViTForImageClassification". Settings of
    training that transformers does not have are left out.

    Raises:
        ValueError: a model without a class token, or that does not pool by it, which transformers lacks.
    """
    for name, value, expected in (
        ("class_token", config.class_token, True),
        ("pooling", config.pooling, "token"),
        ("norm_after_pooling", config.norms_features, False),
    ):
        if value != expected:
            raise bad_argument(
                f"ViTConfig.{name}",
                repr(value),
                f"{expected!r}, the only one of Hugging Face's ViT",
                "save the state dict of to_timm(model), or with torch.save",
            )
    plain = config.to_dict()
    names = config.class_names or tuple(f"LABEL_{number}" for number in range(config.n_classes))
    return {
        "architectures": [architecture],
        "model_type": "vit",
        **{theirs: plain[ours] for theirs, ours in _FIELDS.items()},
        "intermediate_size": config.inner_dim,
        "hidden_act": ENCODER_ACTIVATIONS[config.activation],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _classes_from(fields: Mapping[str, Any]) -> dict[str, Any]:
    labels = fields.get("id2label")
    if labels is None:
        return {"n_classes": fields.get("num_labels", _N_LABELS)}
    if not isinstance(labels, Mapping):
        raise unsupported("id2label", labels, "an object of class number to name")
    by_number = {str(number): name for number, name in labels.items()}
    if set(by_number) != {str(number) for number in range(len(by_number))}:
        raise unsupported("id2label", labels, f"a name for each of the classes 0 to {len(by_number) - 1}")
    names = tuple(str(by_number[str(number)]) for number in range(len(by_number)))
    have_none = names == tuple(f"LABEL_{number}" for number in range(len(names)))
    return {"n_classes": len(names), "class_names": None if have_none else names}
