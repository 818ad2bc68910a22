"""Decoder-only language models: one model for all families, from GPT-2 to LLaMA, Falcon and Qwen.

The families and their published sizes are in ``gpt.families``, Hugging Face's files in ``gpt.hugging_face``.
"""

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.model import GPTLMHeadModel, GPTModel
from flash_attn_models.gpt.rotary_scaling import RotaryScaling
from flash_attn_models.gpt.vocabulary import with_vocab_size

__all__ = ["GPTConfig", "GPTLMHeadModel", "GPTModel", "RotaryScaling", "with_vocab_size"]
