"""Building blocks of transformer models."""

from flash_attn_models.layers.alibi import ALiBi
from flash_attn_models.layers.attention import CausalSelfAttention
from flash_attn_models.layers.block import Block, DecoderPostNormBlock, ParallelBlock
from flash_attn_models.layers.cross_attention import CrossAttention, ProjectedContext
from flash_attn_models.layers.depthwise_conv import CausalDepthwiseConv
from flash_attn_models.layers.embedding import GPTEmbeddings
from flash_attn_models.layers.kv_cache import KVCache
from flash_attn_models.layers.mlp import MLP, GatedMLP
from flash_attn_models.layers.packed import Documents
from flash_attn_models.layers.stochastic_depth import StochasticDepth

__all__ = [
    "MLP",
    "ALiBi",
    "Block",
    "CausalDepthwiseConv",
    "CausalSelfAttention",
    "CrossAttention",
    "DecoderPostNormBlock",
    "Documents",
    "GPTEmbeddings",
    "GatedMLP",
    "KVCache",
    "ParallelBlock",
    "ProjectedContext",
    "StochasticDepth",
]
