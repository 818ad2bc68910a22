"""Decoder families of GPT-2 and LLaMA, BERT and ViT: layers, pretrained weights, generation."""

from flash_attn_models.bert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from flash_attn_models.generation import generate
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_models.pretrained import from_pretrained, load_pretrained, save_pretrained
from flash_attn_models.vit import ViTConfig, ViTForImageClassification, ViTModel

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertModel",
    "GPTConfig",
    "GPTLMHeadModel",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
    "from_pretrained",
    "generate",
    "load_pretrained",
    "save_pretrained",
]
