"""Hugging Face's ViT models as ours and back: configs and state dicts."""

from flash_attn_models.gpt.hugging_face.state_dict import from_hugging_face, to_hugging_face
from flash_attn_models.vit.hugging_face.config import config_from_hugging_face, config_to_hugging_face
from flash_attn_models.vit.hugging_face.layout import (
    MODELS,
    AnyViT,
    Form,
    description,
    empty_model,
    hugging_face_layout,
)

__all__ = [
    "MODELS",
    "AnyViT",
    "Form",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "description",
    "empty_model",
    "from_hugging_face",
    "hugging_face_layout",
    "to_hugging_face",
]
