"""Hugging Face models as GPT models and back: configs and state dicts, one module or object for each model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.hugging_face import (
    baichuan,
    btlm,
    falcon,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gptj,
    llama_like,
    opt,
)
from flash_attn_models.gpt.hugging_face.state_dict import Entry, Layout, from_hugging_face, to_hugging_face

__all__ = [
    "MODEL_TYPES",
    "Entry",
    "Layout",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "from_hugging_face",
    "hugging_face_layout",
    "to_hugging_face",
]


class _Family(Protocol):
    """What a module or an object tells of a model type."""

    def config_from(self, fields: Mapping[str, Any], /) -> GPTConfig: ...

    def config_to(self, config: GPTConfig, /) -> dict[str, Any]: ...

    def obstacles(self, config: GPTConfig, /) -> dict[str, str]: ...

    def layout(self, config: GPTConfig, /) -> Layout: ...


# Where several can express a config, the first is chosen.
_FAMILIES: dict[str, _Family] = {
    "gpt2": gpt2,
    "llama": llama_like.llama,
    "mistral": llama_like.mistral,
    "qwen2": llama_like.qwen2,
    "qwen3": llama_like.qwen3,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "opt": opt,
    "falcon": falcon,
    "gpt_bigcode": gpt_bigcode,
    "baichuan": baichuan,
    "btlm": btlm,
}
MODEL_TYPES = tuple(_FAMILIES)


def config_from_hugging_face(fields: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a Hugging Face model, given the contents of its ``config.json``.

    Every field is translated, or known not to change what the model computes, or refused: ValueError with its
    name and the reason.
    """
    return _family(fields.get("model_type")).config_from(fields)


def config_to_hugging_face(config: GPTConfig, model_type: str | None = None) -> dict[str, Any]:
    """The contents of a ``config.json`` from which transformers builds the same model.

    Dropout rates that the Hugging Face model does not have are left out. Raises ValueError naming the fields that the
    model type, or the nearest one, cannot express.

    Args:
        config: the model.
        model_type: one of ``MODEL_TYPES``; None is the first that can express the config.
    """
    families = _FAMILIES if model_type is None else {model_type: _family(model_type)}
    obstacles = {name: family.obstacles(config) for name, family in families.items()}
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[nearest]:
        raise bad_argument(
            "config",
            ", ".join(f"{field}={getattr(config, field)!r}" for field in obstacles[nearest]),
            f"what Hugging Face's {nearest!r} has: "
            + ", ".join(f"{field} {expected}" for field, expected in obstacles[nearest].items()),
            "keep this model with torch.save(model.state_dict(), ...) and config.to_dict()",
        )
    return families[nearest].config_to(config)


def hugging_face_layout(config: GPTConfig, model_type: str) -> Layout:
    """The tensors of a checkpoint of this config, saved as one of ``MODEL_TYPES``."""
    return _family(model_type).layout(config)


def _family(model_type: object) -> _Family:
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise bad_argument(
            "config field 'model_type'",
            repr(model_type),
            f"one of {', '.join(map(repr, _FAMILIES))}",
            "use a model of one of these types",
        )
    return _FAMILIES[model_type]
