"""The operators behind calls on a key-value cache, and which of them a call gets.

Both are registered with torch, also where they run portably: the append declares what it writes, so that torch.compile
and torch.export see it, and the attention reads lengths on the host, which a graph must not be broken for. Neither has
a gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kvcache_append, kvcache_portable, library, operator_arguments
from .blockwise_scores import compute_dtype
from .call import compute_capability
from .dispatch import KERNEL_DTYPES, MAX_HEAD_DIM
from .tracing import constant_under_compile

# torch.compile makes a mutating operator functional only if its results are plain tensors: an optional one is refused.
APPEND_SCHEMA = (
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? q,"
    " Tensor? rotary_cos, Tensor? rotary_sin, bool interleaved, bool q_per_position, Tensor? cache_batch_idx,"
    " Tensor? block_table, Tensor? cu_seqlens_k_new, Tensor? cu_seqlens_q) -> Tensor"
)
DECODE_SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens_k, Tensor? block_table, Tensor? cache_batch_idx,"
    " Tensor? cache_leftpad, Tensor? cu_seqlens_q, float softmax_scale, int window_left, int window_right,"
    " float softcap, Tensor? alibi_slopes, Tensor? learnable_sink, int num_splits, bool batch_invariant)"
    " -> (Tensor, Tensor)"
)


def fake_append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    q: Tensor | None,
    rotary_cos: Tensor | None,
    *others: Any,
) -> Tensor:
    """Shape and dtype of what the append returns."""
    return k_cache.new_empty(0 if q is None or rotary_cos is None else q.shape)


def fake_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of out and lse."""
    *tokens, H, _ = q.shape
    *batch, rows = tokens
    out = q.new_empty((*tokens, H, v_cache.shape[-1]))
    return out, q.new_empty((*batch, H, rows), dtype=compute_dtype(q.dtype))


def _register(name: str, schema: str, function: Any, fake: Any) -> Any:
    qualified = f"flash_attn_kernels::{name}"
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    return getattr(torch.ops.flash_attn_kernels, name).default


_library = torch.library.Library("flash_attn_kernels", "FRAGMENT")


class CacheOperators(NamedTuple):
    """The two operators of a call, and why they are not compiled ones; nothing if they are."""

    append_kv: Any
    decode: Any
    why_portable: tuple[str, ...]


_PORTABLE = CacheOperators(
    _register("portable_append_kv", APPEND_SCHEMA, kvcache_append.append_kv, fake_append_kv),
    _register("portable_decode", DECODE_SCHEMA, kvcache_portable.decode, fake_decode),
    (),
)


def choose_operators(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> CacheOperators:
    """The fastest operators for caches of this kind."""
    reasons = _why_not_compiled(device, dtype, head_dim, head_dim_v)
    return _PORTABLE._replace(why_portable=reasons) if reasons else _compiled()


def _why_not_compiled(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> tuple[str, ...]:
    if device.type != "cuda":
        return (f"tensors are on {device.type}, the CUDA kernels need an NVIDIA GPU",)
    reasons = []
    capability = compute_capability(device.index)
    if capability is not None and capability < (8, 0):
        reasons.append("compute capability {}.{} is below 8.0".format(*capability))
    if dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype {dtype} is neither float16 nor bfloat16")
    dims = f"q/k {head_dim}, v {head_dim_v}"
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"a head dim ({dims}) is above {MAX_HEAD_DIM}")
    if head_dim % 8 != 0 or head_dim_v % 8 != 0:
        reasons.append(f"a head dim ({dims}) is not a multiple of 8")
    library_error = library.load_error()
    if library_error is not None:
        reasons.append(library_error)
    return tuple(reasons)


@constant_under_compile
def _compiled() -> CacheOperators:
    """Only called when the library is loaded."""
    return _register_fakes_once()


@functools.cache
def _register_fakes_once() -> CacheOperators:
    torch.library.register_fake("flash_attn_kernels::append_kv", fake_append_kv)
    torch.library.register_fake("flash_attn_kernels::decode", fake_decode)
    return CacheOperators(_compiled_append_kv, _compiled_decode, ())


def _compiled_append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    q: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    interleaved: bool,
    q_per_position: bool,
    *layout: Tensor | None,
) -> Tensor:
    """The CUDA operator, with tables in the form that it takes."""
    rotated = torch.ops.flash_attn_kernels.append_kv.default(
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens.contiguous(),
        q,
        _contiguous(rotary_cos),
        _contiguous(rotary_sin),
        interleaved,
        q_per_position,
        *map(_contiguous, layout),
    )
    if not torch.compiler.is_compiling():
        # As every operation in place: a graph that has saved the caches must notice.
        torch.autograd.graph.increment_version([k_cache, v_cache])
    return rotated


def _compiled_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    num_splits: int,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """The CUDA operator, with tables in the form that it takes."""
    return torch.ops.flash_attn_kernels.decode.default(
        q,
        k_cache,
        v_cache,
        seqlens_k.contiguous(),
        _contiguous(block_table),
        _contiguous(cache_batch_idx),
        _contiguous(cache_leftpad),
        _contiguous(cu_seqlens_q),
        softmax_scale,
        window_left,
        window_right,
        softcap,
        operator_arguments.per_head(alibi_slopes),
        operator_arguments.per_head(learnable_sink),
        num_splits,
        batch_invariant,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
