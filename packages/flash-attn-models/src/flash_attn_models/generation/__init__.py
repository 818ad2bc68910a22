"""Text generation: key/value cache, sampling, and the loop that puts them together."""

from flash_attn_models.generation.generate import generate, make_cache, stream_tokens
from flash_attn_models.generation.sampling import (
    filter_logits,
    keep_top_k,
    keep_top_p,
    sample,
    scale_by_temperature,
)
from flash_attn_models.layers.kv_cache import KVCache

__all__ = [
    "KVCache",
    "filter_logits",
    "generate",
    "keep_top_k",
    "keep_top_p",
    "make_cache",
    "sample",
    "scale_by_temperature",
    "stream_tokens",
]
