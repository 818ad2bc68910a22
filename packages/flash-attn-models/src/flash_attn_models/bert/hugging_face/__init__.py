"""Hugging Face's BERT models as ours and back: configs and state dicts."""

from flash_attn_models.bert.hugging_face.config import config_from_hugging_face, config_to_hugging_face
from flash_attn_models.bert.hugging_face.layout import AnyBert, Form, hugging_face_layout
from flash_attn_models.gpt.hugging_face.state_dict import from_hugging_face, to_hugging_face

__all__ = [
    "AnyBert",
    "Form",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "from_hugging_face",
    "hugging_face_layout",
    "to_hugging_face",
]
