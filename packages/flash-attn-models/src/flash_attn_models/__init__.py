"""Decoder families of GPT-2 and LLaMA, BERT and ViT: layers, Hugging Face weights, generation."""

from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.pretrained import load_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = ["GPTConfig", "GPTLMHeadModel", "generate", "load_pretrained", "save_pretrained"]
