"""The compiled kernels: found and loaded on first use, never at import.

The library registers ``torch.ops.flash_attn_kernels.*`` through torch's stable ABI. It contains no Python and no
torch version, and it loads in CPU-only torch too, where its operators exist for meta and fake tensors.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tracing import constant_under_compile

LIBRARY_PATH = Path(__file__).parent / "lib" / "libflash_attn_kernels.so"

# The operators, once the library is loaded: kept here because looking them up in torch.ops takes longer than a call
# of Python does.
sm80_forward: Any = None
sm80_forward_dense: Any = None
sm80_backward: Any = None


@constant_under_compile
def load_error() -> str | None:
    """Load the library once; None when its operators are there, otherwise the reason why not."""
    return _load()


@functools.cache
def _load() -> str | None:
    global sm80_forward, sm80_forward_dense, sm80_backward
    if not LIBRARY_PATH.exists():
        return (
            "this installation has no compiled kernels (install a platform wheel, or build with "
            "FLASH_ATTN_KERNELS_BUILD=always)"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels failed to load: {error.__cause__ or error}"
    torch.library.register_fake("flash_attn_kernels::sm80_forward", _fake_sm80_forward)
    torch.library.register_fake("flash_attn_kernels::sm80_forward_dense", _fake_sm80_forward_dense)
    torch.library.register_fake("flash_attn_kernels::sm80_backward", _fake_sm80_backward)
    sm80_forward = torch.ops.flash_attn_kernels.sm80_forward.default
    sm80_forward_dense = torch.ops.flash_attn_kernels.sm80_forward_dense.default
    sm80_backward = torch.ops.flash_attn_kernels.sm80_backward.default
    return None


# Shapes, dtypes and strides of the operators' results, for FakeTensor, meta tensors and torch.compile.


def _fake_sm80_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    seed_and_offset: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    *tokens, H, _ = q.shape  # (B, Sq) or (Tq,)
    *batch, rows = tokens
    return q.new_empty((*tokens, H, v.shape[-1])), q.new_empty((*batch, H, rows), dtype=torch.float32)


def _fake_sm80_forward_dense(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int, window_right: int, top_left: bool
) -> tuple[Tensor, Tensor]:
    B, Sq, H, _ = q.shape
    return q.new_empty((B, Sq, H, v.shape[-1])), q.new_empty((B, H, Sq), dtype=torch.float32)


def _fake_sm80_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    attn_bias: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    seed_and_offset: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    top_left: bool,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    needs_attn_bias: bool,
    needs_alibi_slopes: bool,
    needs_learnable_sink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def fp32(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    dbias = fp32(0)
    if attn_bias is not None and needs_attn_bias:
        dbias = fp32(*attn_bias.shape)
        if cu_seqlens_q is None and attn_bias.shape == (batch, q.shape[2], q.shape[1], k.shape[1]):
            dbias = attn_bias.new_empty(
                attn_bias.shape
            )  # every element is written once: nothing to sum in fp32
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        dbias,
        fp32(batch, q.shape[-2]) if needs_alibi_slopes else fp32(0),
        fp32(batch, q.shape[-2]) if needs_learnable_sink else fp32(0),
    )
