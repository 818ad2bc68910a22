"""Hugging Face models as GPT models and back: configs and state dicts of the families "gpt2" and "llama"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face import gpt2, llama
from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout, from_hugging_face, to_hugging_face

__all__ = [
    "Entry",
    "Layout",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "from_hugging_face",
    "hugging_face_layout",
    "to_hugging_face",
]

_FAMILIES = {"gpt2": gpt2, "llama": llama}


def config_from_hugging_face(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a Hugging Face model, given the contents of its ``config.json``.

    Every field is translated, or known not to change what the model computes, or refused: ValueError with its
    name and the reason.
    """
    return _family(fields.get("model_type")).config_from(fields)


def config_to_hugging_face(config: GPTConfig) -> dict[str, Any]:
    """The contents of a ``config.json`` from which transformers builds the same model.

    Dropout rates that the Hugging Face model does not have are left out. Raises ValueError naming the fields
    that neither family can express.
    """
    obstacles = {name: family.obstacles(config) for name, family in _FAMILIES.items()}
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[nearest]:
        raise bad_argument(
            "config",
            ", ".join(f"{field}={getattr(config, field)!r}" for field in obstacles[nearest]),
            f"what Hugging Face's {nearest!r} has: "
            + ", ".join(f"{field} {expected}" for field, expected in obstacles[nearest].items()),
            "keep this model with torch.save(model.state_dict(), ...) and config.to_dict()",
        )
    return _FAMILIES[nearest].config_to(config)


def hugging_face_layout(config: GPTConfig, model_type: str) -> Layout:
    """The tensors of a checkpoint of this config, saved as model type "gpt2" or "llama"."""
    return _family(model_type).layout(config)


def _family(model_type: object) -> Any:
    if model_type not in _FAMILIES:
        raise bad_argument(
            "config field 'model_type'",
            repr(model_type),
            f"one of {', '.join(map(repr, _FAMILIES))}",
            "use a model of one of these types",
        )
    return _FAMILIES[model_type]
