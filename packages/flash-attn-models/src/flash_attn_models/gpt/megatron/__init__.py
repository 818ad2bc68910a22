"""Megatron-LM's GPT checkpoints: config, tensors and files, both ways."""

from flash_attn_models.gpt.megatron.config import config_from_args, config_to_args
from flash_attn_models.gpt.megatron.files import is_megatron, open_megatron, save_megatron
from flash_attn_models.gpt.megatron.layout import megatron_layout

__all__ = [
    "config_from_args",
    "config_to_args",
    "is_megatron",
    "megatron_layout",
    "open_megatron",
    "save_megatron",
]
