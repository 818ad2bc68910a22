"""Checks of what shapes, dtypes and options tell about a call on a key-value cache.

Every rejection names the argument, what came, what is accepted and the fix, and comes before the cache is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .checks import DTYPES
from .errors import bad_argument
from .forward_mode import has_tangent, may_have_tangents
from .kvcache_inputs import CacheTensors

MAX_SPLITS = 256

_DENSE_QUERIES = "(batch, seqlen_q, heads, head_dim)"
_PACKED_QUERIES = "(total_q, heads, head_dim), as cu_seqlens_q is given"


def check_shapes(tensors: CacheTensors) -> None:
    """Everything that can be said without reading a tensor, save ALiBi slopes and sinks.

    Raises:
        ValueError: for the first thing that does not fit.
    """
    check_caches(tensors.k_cache, tensors.v_cache, is_paged=tensors.block_table is not None)
    _check_kinds(tensors)
    if tensors.q is not None:
        _check_queries(tensors, tensors.q)
    _check_new_tokens(tensors)
    _check_places(tensors)
    if isinstance(tensors.cache_seqlens, Tensor):
        check_index_tensor("cache_seqlens", tensors.cache_seqlens, tensors.k_cache, tensors.batch)
    elif tensors.cache_seqlens is None and tensors.k is not None:
        raise bad_argument(
            "cache_seqlens",
            "None",
            "the lengths before the append, as k is given",
            "pass an int or (B,) int32",
        )
    _check_rotary(tensors)


def check_length(tensors: CacheTensors) -> None:
    """A length that is a number fits into the cache, together with dense new keys."""
    length = tensors.cache_seqlens
    if length is None or isinstance(length, Tensor):
        return
    if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool):
        raise bad_argument(
            "cache_seqlens", type(length).__name__, "an int, or an int32 tensor (batch,)", "convert it"
        )
    capacity = tensors.capacity
    new = tensors.k.shape[1] if tensors.k is not None and tensors.k.dim() == 4 else 0
    if length < 0 or length + new > capacity:
        raise bad_argument(
            "cache_seqlens",
            f"{length}, and {new} new keys",
            f"a length >= 0 that leaves room for them in {capacity} positions",
            "make the cache longer, or drop keys",
        )


def check_splits(num_splits: int, batch_invariant: bool) -> None:
    """0 is chosen, 1 is none; more make the summation depend on the length, which batch invariance excludes."""
    if not isinstance(num_splits, int) or not 0 <= num_splits <= MAX_SPLITS:
        raise bad_argument(
            "num_splits", num_splits, f"an integer in [0, {MAX_SPLITS}]", "pass 0 to have it chosen"
        )
    if batch_invariant and num_splits > 1:
        raise bad_argument(
            "num_splits",
            num_splits,
            "0 or 1 with batch_invariant, whose parts have fixed places",
            "leave num_splits at 0",
        )


def check_no_derivative(tensors: CacheTensors) -> None:
    """There is no backward, and no forward-mode derivative: one that is needed would silently be lost."""
    grad_enabled, may_be_dual = torch.is_grad_enabled(), not is_compiling() and may_have_tangents()
    if not (grad_enabled or may_be_dual):
        return
    for name, x in zip(tensors._fields, tensors, strict=True):
        if not isinstance(x, Tensor):
            continue
        if grad_enabled and x.requires_grad:
            raise bad_argument(
                name,
                "a tensor that requires a gradient, with gradients enabled",
                "none: attention on a cache has only a forward",
                f"call it under torch.no_grad() or pass {name}.detach(); to train, use flash_attn_func or "
                "flash_attn_varlen_func",
            )
        if may_be_dual and has_tangent(x):
            raise bad_argument(
                name,
                "a tensor with a tangent",
                "none: attention on a cache has no forward-mode derivative",
                "use flash_attn_func or flash_attn_varlen_func",
            )


def check_index_tensor(name: str, x: Tensor, like: Tensor, length: int | None) -> None:
    """int32, one-dimensional (of ``length``, or at least 1), on the device of ``like``."""
    if not isinstance(x, Tensor):
        raise bad_argument(name, type(x).__name__, "an int32 tensor", "convert it with torch.as_tensor")
    if x.dim() != 1 or (x.shape[0] < 1 if length is None else x.shape[0] != length):
        expected = "(batch + 1,)" if length is None else f"({length},)"
        fix = "pass cumulative lengths starting at 0" if length is None else "pass one entry per sequence"
        raise bad_argument(name, f"shape {tuple(x.shape)}", f"an int32 tensor of shape {expected}", fix)
    if x.dtype != torch.int32:
        raise bad_argument(name, f"dtype {x.dtype}", "torch.int32", f"{name}.to(torch.int32)")
    _check_device(name, x, like)


def _check_is_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise bad_argument(name, type(x).__name__, "a torch.Tensor", "convert it with torch.as_tensor")


def _check_device(name: str, x: Tensor, cache: Tensor) -> None:
    if x.device != cache.device:
        raise bad_argument(
            name, f"device {x.device}", f"the device of k_cache, {cache.device}", "move it with .to"
        )


def _check_like_cache(name: str, x: Tensor, cache: Tensor, cache_name: str) -> None:
    """Device, dtype, heads and head dim of new keys or values are those of their cache."""
    _check_device(name, x, cache)
    if x.dtype != cache.dtype:
        raise bad_argument(
            name,
            f"dtype {x.dtype}",
            f"the dtype of {cache_name}, {cache.dtype}",
            f"{name}.to({cache_name}.dtype)",
        )
    if x.shape[-2:] != cache.shape[-2:]:
        raise bad_argument(
            name,
            f"shape {tuple(x.shape)}",
            f"the heads and head_dim of {cache_name}, {tuple(cache.shape[-2:])}, as its last dimensions",
            f"pass what {cache_name} is made for",
        )


def check_caches(k_cache: Tensor, v_cache: Tensor, *, is_paged: bool) -> None:
    """The caches are two of a kind."""
    shape = "(num_pages, page_size, heads, head_dim)" if is_paged else "(batch, seqlen, heads, head_dim)"
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_is_tensor(name, x)
        if x.dim() != 4:
            raise bad_argument(name, f"shape {tuple(x.shape)}", f"shape {shape}", f"reshape {name}")
        if x.dtype not in DTYPES:
            raise bad_argument(
                name,
                f"dtype {x.dtype}",
                "a floating-point dtype: float16, bfloat16, float32 or float64",
                "make the cache in the dtype of the model",
            )
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            raise bad_argument(
                name,
                f"shape {tuple(x.shape)}",
                "at least 1 head and a head_dim of at least 1",
                "skip the call",
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise bad_argument(
                name,
                f"strides {x.stride()}",
                "a contiguous last dimension",
                "allocate the cache with head_dim last: it is written in place, so no copy can stand in",
            )
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        raise bad_argument(
            "v_cache",
            f"shape {tuple(v_cache.shape)}",
            f"the leading shape of k_cache, {tuple(k_cache.shape[:-1])}",
            "allocate both caches alike",
        )
    if v_cache.dtype != k_cache.dtype:
        raise bad_argument(
            "v_cache",
            f"dtype {v_cache.dtype}",
            f"the dtype of k_cache, {k_cache.dtype}",
            "allocate both alike",
        )
    _check_device("v_cache", v_cache, k_cache)
    if is_paged and k_cache.shape[1] == 0:
        raise bad_argument(
            "k_cache", "a page size of 0", "a page size of at least 1", "allocate larger pages"
        )


def _check_kinds(tensors: CacheTensors) -> None:
    """What everything else looks at: types, cumulative lengths, and the page table."""
    for name in ("cu_seqlens_q", "cu_seqlens_k_new"):
        x = getattr(tensors, name)
        if x is not None:
            check_index_tensor(name, x, tensors.k_cache, None)
    for name in ("q", "k", "v"):
        x = getattr(tensors, name)
        if x is not None:
            _check_is_tensor(name, x)
    if tensors.block_table is not None:
        _check_block_table(tensors.block_table, tensors.k_cache)


def _check_block_table(table: Tensor, k_cache: Tensor) -> None:
    _check_is_tensor("block_table", table)
    if table.dim() != 2:
        raise bad_argument(
            "block_table", f"shape {tuple(table.shape)}", "(batch, max_pages)", "pass one row per sequence"
        )
    if table.dtype != torch.int32:
        raise bad_argument(
            "block_table", f"dtype {table.dtype}", "torch.int32", "block_table.to(torch.int32)"
        )
    _check_device("block_table", table, k_cache)


def _check_queries(tensors: CacheTensors, q: Tensor) -> None:
    k_cache = tensors.k_cache
    rank, shape = (4, _DENSE_QUERIES) if tensors.cu_seqlens_q is None else (3, _PACKED_QUERIES)
    if q.dim() != rank:
        fix = "pass cu_seqlens_q with packed queries" if q.dim() == 3 else "reshape q"
        raise bad_argument("q", f"shape {tuple(q.shape)}", f"shape {shape}", fix)
    _check_device("q", q, k_cache)
    if q.dtype != k_cache.dtype:
        raise bad_argument(
            "q", f"dtype {q.dtype}", f"the dtype of k_cache, {k_cache.dtype}", "q.to(k_cache.dtype)"
        )
    if q.shape[-1] != k_cache.shape[-1]:
        raise bad_argument(
            "q",
            f"head_dim {q.shape[-1]}",
            f"the head_dim of k_cache, {k_cache.shape[-1]}",
            "project q and k to one head_dim",
        )
    heads, kv_heads = q.shape[-2], k_cache.shape[-2]
    if heads == 0 or heads % kv_heads != 0:
        raise bad_argument(
            "q",
            f"{heads} heads",
            f"a multiple of the {kv_heads} heads of k_cache and v_cache",
            "pass q with a multiple of its heads; (batch, heads, seqlen, head_dim) tensors with .transpose(1, 2)",
        )


def _check_new_tokens(tensors: CacheTensors) -> None:
    k, v = tensors.k, tensors.v
    if (k is None) != (v is None):
        name, other = ("v", "k") if v is None else ("k", "v")
        raise bad_argument(name, "None", f"new ones, as {other} is given", "pass both k and v, or neither")
    if k is None or v is None:
        if tensors.cu_seqlens_k_new is not None:
            raise bad_argument(
                "cu_seqlens_k_new", "lengths of new keys", "None, as k is None", "pass k and v"
            )
        return
    if k.dim() not in (3, 4):
        raise bad_argument(
            "k",
            f"shape {tuple(k.shape)}",
            "(batch, new tokens, heads, head_dim) or (total new tokens, heads, head_dim)",
            "reshape k",
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise bad_argument(
            "v", f"shape {tuple(v.shape)}", f"the leading shape of k, {tuple(k.shape[:-1])}", "align k and v"
        )
    _check_like_cache("k", k, tensors.k_cache, "k_cache")
    _check_like_cache("v", v, tensors.v_cache, "v_cache")
    if k.dim() == 4:
        _check_dense_new_tokens(tensors, k)
    else:
        _check_packed_new_tokens(tensors, k)
    for name, x in (("k_cache", tensors.k_cache), ("v_cache", tensors.v_cache)):
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise bad_argument(
                name,
                f"strides {x.stride()}",
                "memory of its own for each element, as k is appended",
                "clone it",
            )


def _check_dense_new_tokens(tensors: CacheTensors, k: Tensor) -> None:
    if tensors.cu_seqlens_k_new is not None:
        raise bad_argument(
            "cu_seqlens_k_new", "lengths of packed keys", "None, as k has a batch dimension", "leave it out"
        )
    if k.shape[0] != tensors.batch:
        raise bad_argument("k", f"batch {k.shape[0]}", f"the batch of q, {tensors.batch}", "align q and k")
    if k.shape[1] > tensors.capacity:
        raise bad_argument(
            "k",
            f"{k.shape[1]} new keys for each sequence",
            f"at most the {tensors.capacity} positions of the cache",
            "make the cache longer" if tensors.block_table is None else "add columns to block_table",
        )


def _check_packed_new_tokens(tensors: CacheTensors, k: Tensor) -> None:
    cu_seqlens = tensors.cu_seqlens_new
    if cu_seqlens is None:
        raise bad_argument(
            "cu_seqlens_k_new", "None", "cumulative lengths (batch + 1,), as k is packed", "pass them"
        )
    if cu_seqlens.shape[0] - 1 != tensors.batch:
        raise bad_argument(
            "cu_seqlens_k_new",
            f"{cu_seqlens.shape[0] - 1} sequences",
            f"the {tensors.batch} of q",
            "pass one length per sequence",
        )
    if tensors.cu_seqlens_k_new is None and tensors.q is not None and k.shape[0] != tensors.q.shape[0]:
        raise bad_argument(
            "k",
            f"{k.shape[0]} packed tokens",
            f"the {tensors.q.shape[0]} of q, as they share cu_seqlens_q",
            "pass cu_seqlens_k_new if there are others",
        )


def _check_places(tensors: CacheTensors) -> None:
    """Where the sequences of a batch lie in the cache."""
    batch, table, batch_idx = tensors.batch, tensors.block_table, tensors.cache_batch_idx
    k_cache = tensors.k_cache
    for name, x in (("cache_batch_idx", batch_idx), ("cache_leftpad", tensors.cache_leftpad)):
        if x is not None:
            check_index_tensor(name, x, k_cache, batch)
    if table is not None:
        if batch_idx is None and table.shape[0] != batch:
            raise bad_argument(
                "block_table",
                f"shape {tuple(table.shape)}",
                f"({batch}, max_pages)",
                "pass one row per sequence",
            )
    elif batch_idx is None and k_cache.shape[0] != batch:
        raise bad_argument(
            "k_cache",
            f"batch {k_cache.shape[0]}",
            f"one row for each of the {batch} sequences",
            "slice the caches to the rows in use, or say with cache_batch_idx which they are",
        )


def _check_rotary(tensors: CacheTensors) -> None:
    cos, sin, head_dim = tensors.rotary_cos, tensors.rotary_sin, tensors.k_cache.shape[-1]
    if (cos is None) != (sin is None):
        name, other = ("rotary_cos", "rotary_sin") if cos is None else ("rotary_sin", "rotary_cos")
        raise bad_argument(name, "None", f"a table, as {other} is given", "pass both, or neither")
    if cos is None or sin is None:
        return
    if tensors.k is None:
        raise bad_argument(
            "rotary_cos",
            "a table without new keys",
            "k and v to rotate",
            "pass k and v, or rotate q yourself",
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_is_tensor(name, x)
        if x.dim() != 2 or x.shape != cos.shape or x.shape[1] == 0 or 2 * x.shape[1] > head_dim:
            raise bad_argument(
                name,
                f"shape {tuple(x.shape)}",
                f"(positions, rotary_dim / 2) with rotary_dim <= {head_dim}, the same for both tables",
                "pass half as many columns as dimensions are rotated",
            )
        if x.dtype not in (torch.float32, tensors.k_cache.dtype) or x.dtype != cos.dtype:
            raise bad_argument(
                name,
                f"dtype {x.dtype}",
                f"torch.float32 or that of k_cache, {tensors.k_cache.dtype}, the same for both tables",
                f"{name}.float()",
            )
        _check_device(name, x, tensors.k_cache)
    if cos.shape[0] < max(tensors.capacity, 1):
        raise bad_argument(
            "rotary_cos",
            f"{cos.shape[0]} positions",
            f"at least the {tensors.capacity} of the cache",
            "make the tables for the capacity of the cache",
        )
