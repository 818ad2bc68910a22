"""Building blocks of transformer models."""

from flash_attn_models.layers.alibi import ALiBi
from flash_attn_models.layers.attention import CausalSelfAttention
from flash_attn_models.layers.block import Block, DecoderPostNormBlock, ParallelBlock
from flash_attn_models.layers.embedding import GPTEmbeddings
from flash_attn_models.layers.kv_cache import KVCache
from flash_attn_models.layers.mlp import MLP, GatedMLP

__all__ = [
    "MLP",
    "ALiBi",
    "Block",
    "CausalSelfAttention",
    "DecoderPostNormBlock",
    "GPTEmbeddings",
    "GatedMLP",
    "KVCache",
    "ParallelBlock",
]
