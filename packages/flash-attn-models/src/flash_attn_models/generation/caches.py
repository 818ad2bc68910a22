"""Caches for a model: alone, as a pool of pages, and as one call of ``generate`` needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from flash_attn_models.autocast import product_dtype
from flash_attn_models.errors import bad_argument, did_you_mean
from flash_attn_models.generation.numbers import read_whole
from flash_attn_models.generation.paged_cache import PagedKVCache, PagePool
from flash_attn_models.gpt.model import GPTLMHeadModel
from flash_attn_models.layers.kv_cache import Cache, KVCache

DEFAULT_PAGE_SIZE = 64
CacheKind = Literal["contiguous", "paged"] | PagePool

# On a GPU the capacity of a cache is a multiple of this. A captured step belongs to one capacity, and so serves all
# requests up to it; steps that are not captured have the same capacity, on which the order of their sums may depend.
_CAPACITY_STEP = 128


@torch.inference_mode(False)  # it may serve outside of the caller's mode, too
def make_cache(model: GPTLMHeadModel, batch_size: int, max_seqlen: int) -> KVCache:
    """An empty cache of the model's shape, on its device, in the dtype that its attention computes in."""
    return KVCache(
        model.config.n_layer,
        batch_size,
        max_seqlen,
        model.cache_heads,
        model.config.head_dim,
        device=model.head_weight.device,
        dtype=attention_dtype(model),
    )


def make_page_pool(model: GPTLMHeadModel, n_pages: int, page_size: int = DEFAULT_PAGE_SIZE) -> PagePool:
    """Free pages of the model's shape, on its device, in the dtype that its attention computes in."""
    return PagePool(
        model.config.n_layer,
        n_pages,
        page_size,
        model.cache_heads,
        model.config.head_dim,
        device=model.head_weight.device,
        dtype=attention_dtype(model),
    )


def cache_capacity(model: GPTLMHeadModel, room: Sequence[int]) -> int:
    """Positions of a cache for rows that need ``room[b]`` each."""
    longest = max(room)
    if model.head_weight.device.type != "cuda":
        return longest
    return max(longest, min(-(-longest // _CAPACITY_STEP) * _CAPACITY_STEP, model.config.max_seqlen))


@torch.inference_mode(False)
def open_cache(model: GPTLMHeadModel, kind: CacheKind, page_size: int, room: Sequence[int]) -> Cache:
    """An empty cache with room for ``room[b]`` tokens of row b; to be given back by ``close_cache``."""
    capacity = cache_capacity(model, room)
    if kind == "contiguous":
        return make_cache(model, len(room), capacity)
    pool = (
        kind if isinstance(kind, PagePool) else make_page_pool(model, count_pages(room, page_size), page_size)
    )
    return PagedKVCache(pool, room, table_columns=pool.pages_for(capacity))


def close_cache(cache: Cache) -> None:
    """Give pages back to their pool."""
    if isinstance(cache, PagedKVCache):
        cache.free()


def count_pages(room: Sequence[int], page_size: int) -> int:
    """Pages of all rows together."""
    return sum(-(-tokens // page_size) for tokens in room)


def attention_dtype(model: GPTLMHeadModel) -> torch.dtype:
    """What attention computes in: the dtype of the weights, or of autocast."""
    return product_dtype(model.head_weight)


def check_cache(model: GPTLMHeadModel, cache: object, page_size: int | None) -> None:
    """Raise ValueError unless the options of ``generate`` make sense for this model."""
    kinds = ("contiguous", "paged")
    if not isinstance(cache, PagePool) and cache not in kinds:
        hint = did_you_mean(cache, kinds) if isinstance(cache, str) else ""
        raise bad_argument(
            "cache", f"{cache!r}{hint}", "'contiguous', 'paged' or a PagePool", "choose one of these"
        )
    if page_size is not None and cache != "paged":
        raise bad_argument(
            "page_size",
            page_size,
            "to be left out without cache='paged', where it has no effect",
            "pass cache='paged', or leave it out: a pool has its own",
        )
    if page_size is not None:
        at_least, fix = "at least 1 token", "leave it out for the default"
        if read_whole("page_size", page_size, at_least, fix) < 1:
            raise bad_argument("page_size", page_size, at_least, fix)
    if isinstance(cache, PagePool):
        config, pages = model.config, cache.k[0]
        expected = (config.n_layer, model.cache_heads, config.head_dim, attention_dtype(model))
        if (len(cache.k), *pages.shape[2:], pages.dtype) != expected or (
            pages.device != model.head_weight.device
        ):
            raise bad_argument(
                "cache",
                f"a pool for {len(cache.k)} layers, {pages.shape[2]} heads of width {pages.shape[3]},"
                f" {pages.dtype} on {pages.device}",
                f"one for {expected[0]} layers, {expected[1]} heads of width {expected[2]}, {expected[3]} on"
                f" {model.head_weight.device}",
                "make it with make_page_pool(model, ...)",
            )
