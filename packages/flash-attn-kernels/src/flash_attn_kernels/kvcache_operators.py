"""The operators behind calls on a key-value cache, and which of them a call gets.

All are registered with torch, also where they run portably: an append declares what it writes, so that torch.compile
and torch.export see it, and the attention reads lengths on the host, which a graph must not be broken for. None has a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import kvcache_append, kvcache_portable, library
from .call import compute_capability
from .dispatch import KERNEL_DTYPES, MAX_HEAD_DIM
from .registration import register_operator

# What is often absent comes last and has a default: each argument that is passed costs time.
_OPTIONS = (
    "float softmax_scale, int window_left, int window_right, float softcap=0., int num_splits=0,"
    " bool batch_invariant=False"
)
_LAYOUT = "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cu_seqlens_q=None"
_MODIFIERS = "Tensor? cache_leftpad=None, Tensor? alibi_slopes=None, Tensor? learnable_sink=None"
# torch.compile makes a mutating operator functional only if its results are plain tensors: an optional one is refused.
SCHEMAS = {
    "append_kv": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? q=None,"
        " Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool interleaved=True, bool q_per_position=True,"
        f" {_LAYOUT}, Tensor? cu_seqlens_k_new=None) -> Tensor"
    ),
    "decode": (
        f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, {_OPTIONS}, {_LAYOUT}, {_MODIFIERS})"
        " -> (Tensor, Tensor)"
    ),
    "append_and_decode": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor k, Tensor v,"
        f" {_OPTIONS}, Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool interleaved=True, {_LAYOUT},"
        f" Tensor? cu_seqlens_k_new=None, {_MODIFIERS}) -> (Tensor, Tensor)"
    ),
}


_PORTABLE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "append_kv": kvcache_append.append_kv,
    "decode": kvcache_portable.decode,
    "append_and_decode": kvcache_portable.append_and_decode,
}


class CacheOperators(NamedTuple):
    """The operators of a call, and why they are not compiled ones; nothing if they are."""

    append_kv: Any
    decode: Any
    append_and_decode: Any
    why_portable: tuple[str, ...] = ()

    @property
    def are_compiled(self) -> bool:
        return not self.why_portable


_PORTABLE = CacheOperators(
    *(
        register_operator(f"portable_{name}", schema, _PORTABLE_FUNCTIONS[name], library.CACHE_FAKES[name])
        for name, schema in SCHEMAS.items()
    )
)


def choose_operators(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> CacheOperators:
    """The fastest operators for caches of this kind."""
    reasons = _why_not_compiled(device, dtype, head_dim, head_dim_v)
    if reasons:
        return _PORTABLE._replace(why_portable=reasons)
    return CacheOperators(library.append_kv, library.decode, library.append_and_decode)


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
