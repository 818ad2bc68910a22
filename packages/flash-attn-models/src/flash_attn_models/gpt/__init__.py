"""GPT-2, LLaMA and every decoder between the two."""

from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.model import GPTLMHeadModel, GPTModel

__all__ = ["GPTConfig", "GPTLMHeadModel", "GPTModel"]
