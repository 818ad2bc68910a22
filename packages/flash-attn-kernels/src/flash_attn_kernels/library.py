"""The compiled kernels: found and loaded on first use, never at import.

The library registers ``torch.ops.flash_attn_kernels.*`` through torch's stable ABI. It contains no Python and no
torch version, and it loads in CPU-only torch too, where its operators exist for meta and fake tensors.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blockwise_scores import compute_dtype
from .tracing import constant_under_compile

LIBRARY_PATH = Path(__file__).parent / "lib" / "libflash_attn_kernels.so"

# The CUDA runtime inside the library is of this version, and takes no older driver, also where that of torch does.
MINIMUM_DRIVER_CUDA = (13, 0)

OLDER_THAN_THE_PACKAGE = (
    "the compiled library is older than this package (build it again with tools/build_ext.py)"
)

# The operators, once the library is loaded: kept here because looking them up in torch.ops takes longer than a call
# of Python does.
OPERATORS = (
    "sm80_forward",
    "sm80_forward_dense",
    "sm80_backward",
    "sm90_forward",
    "sm90_forward_dense",
    "sm90_backward",
    "append_kv",
    "decode",
    "append_and_decode",
)
sm80_forward: Any = None
sm80_forward_dense: Any = None
sm80_backward: Any = None
sm90_forward: Any = None
sm90_forward_dense: Any = None
sm90_backward: Any = None
append_kv: Any = None
decode: Any = None
append_and_decode: Any = None


@constant_under_compile
def load_error() -> str | None:
    """Load the library once; None when its operators are there, otherwise the reason why not."""
    return _load()


@functools.cache
def _load() -> str | None:
    global sm80_forward, sm80_forward_dense, sm80_backward
    global sm90_forward, sm90_forward_dense, sm90_backward
    global append_kv, decode, append_and_decode
    if not LIBRARY_PATH.exists():
        return (
            "this installation has no compiled kernels (install a platform wheel, or build with "
            "FLASH_ATTN_KERNELS_BUILD=always)"
        )
    if torch.version.hip is not None:  # whose devices are called cuda too
        return "torch is built for ROCm, the compiled kernels need an NVIDIA GPU"
    driver = _driver_cuda_version()
    if driver is not None and driver < MINIMUM_DRIVER_CUDA:
        return (
            "the GPU driver is made for CUDA {}.{}, the compiled kernels need a driver for CUDA {}.{} or newer "
            "(580 or newer)".format(*driver, *MINIMUM_DRIVER_CUDA)
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels failed to load: {error.__cause__ or error}"
    if not all(hasattr(torch.ops.flash_attn_kernels, name) for name in OPERATORS):
        return OLDER_THAN_THE_PACKAGE
    torch.library.register_fake("flash_attn_kernels::sm80_forward", _fake_sm80_forward)
    torch.library.register_fake("flash_attn_kernels::sm80_forward_dense", _fake_forward_dense)
    torch.library.register_fake("flash_attn_kernels::sm80_backward", _fake_backward)
    torch.library.register_fake("flash_attn_kernels::sm90_forward", _fake_sm90_forward)
    torch.library.register_fake("flash_attn_kernels::sm90_forward_dense", _fake_forward_dense)
    torch.library.register_fake("flash_attn_kernels::sm90_backward", _fake_backward)
    for name, fake in CACHE_FAKES.items():
        torch.library.register_fake(f"flash_attn_kernels::{name}", fake)
    sm80_forward = torch.ops.flash_attn_kernels.sm80_forward.default
    sm80_forward_dense = torch.ops.flash_attn_kernels.sm80_forward_dense.default
    sm80_backward = torch.ops.flash_attn_kernels.sm80_backward.default
    sm90_forward = torch.ops.flash_attn_kernels.sm90_forward.default
    sm90_forward_dense = torch.ops.flash_attn_kernels.sm90_forward_dense.default
    sm90_backward = torch.ops.flash_attn_kernels.sm90_backward.default
    append_kv = torch.ops.flash_attn_kernels.append_kv.default
    decode = torch.ops.flash_attn_kernels.decode.default
    append_and_decode = torch.ops.flash_attn_kernels.append_and_decode.default
    return None


def _driver_cuda_version() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the driver of this machine runs; None where there is no driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return divmod(version.value // 10, 100) if status == 0 else None


# Shapes, dtypes and strides of the operators' results, for FakeTensor, meta tensors and torch.compile.


def _forward_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    *tokens, H, _ = q.shape  # (B, Sq) or (Tq,)
    *batch, rows = tokens
    return q.new_empty((*tokens, H, v.shape[-1])), q.new_empty((*batch, H, rows), dtype=torch.float32)


def _fake_forward_dense(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return _forward_results(q, v)


def _fake_sm80_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    seed_and_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _forward_results(q, v)


def _fake_sm90_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _forward_results(q, v)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    deterministic: bool,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    seed_and_offset: Tensor | None = None,
    dlse: Tensor | None = None,
    needs_attn_bias: bool = False,
    needs_alibi_slopes: bool = False,
    needs_learnable_sink: bool = False,
    one_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1

    def per_head(needed: bool) -> Tensor | None:
        return q.new_empty((batch, q.shape[-2]), dtype=torch.float32) if needed else None

    dbias = None
    if attn_bias is not None and needs_attn_bias:
        is_full = cu_seqlens_q is None and attn_bias.shape == (batch, q.shape[2], q.shape[1], k.shape[1])
        # Every element of a full bias is written once: nothing to sum in fp32.
        dbias = attn_bias.new_empty(attn_bias.shape, dtype=attn_bias.dtype if is_full else torch.float32)
    if one_gradient:
        *tokens, H, D = q.shape
        of_inputs = q.new_empty((*tokens, H + 2 * k.shape[-2], D)), k.new_empty(0), v.new_empty(0)
    else:
        of_inputs = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return (
        *of_inputs,
        dbias,
        per_head(needs_alibi_slopes),
        per_head(needs_learnable_sink),
    )


# The operators on a key-value cache, which also run portably.


def _fake_append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    q: Tensor | None = None,
    *others: Any,
) -> Tensor:
    return k_cache.new_empty(0 if q is None else q.shape)


def _fake_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *tokens, H, _ = q.shape
    *batch, rows = tokens
    out = q.new_empty((*tokens, H, v_cache.shape[-1]))
    return out, q.new_empty((*batch, H, rows), dtype=compute_dtype(q.dtype))


CACHE_FAKES: dict[str, Callable[..., Any]] = {
    "append_kv": _fake_append_kv,
    "decode": _fake_decode,
    "append_and_decode": _fake_decode,
}
