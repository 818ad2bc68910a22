"""Text generation: key/value caches, sampling, and the loop that puts them together."""

from flash_attn_models.generation.caches import make_cache, make_page_pool
from flash_attn_models.generation.cuda_graph import release_cuda_graphs
from flash_attn_models.generation.generate import generate, generate_output, stream_tokens
from flash_attn_models.generation.output import Acceptance, GenerateOutput
from flash_attn_models.generation.paged_cache import PagedKVCache, PagePool
from flash_attn_models.generation.sampling import (
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    scale_by_temperature,
)
from flash_attn_models.layers.kv_cache import KVCache

__all__ = [
    "Acceptance",
    "GenerateOutput",
    "KVCache",
    "PagePool",
    "PagedKVCache",
    "filter_logits",
    "generate",
    "generate_output",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "make_cache",
    "make_page_pool",
    "penalize_repetition",
    "release_cuda_graphs",
    "sample",
    "scale_by_temperature",
    "stream_tokens",
]
