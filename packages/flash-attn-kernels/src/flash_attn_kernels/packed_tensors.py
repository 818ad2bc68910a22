"""Attention of q, k and v that lie in one tensor, or k and v in one: views of it, no copies.

Names, order of tensors and keywords are FlashAttention-2.8's; what goes beyond them is keyword-only. The options are
those of :func:`flash_attn_func` and :func:`flash_attn_varlen_func`, and so are the results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import run
from .errors import bad_argument
from .inputs import PackedLayout


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    """:func:`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = _parts("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    return run(
        q,
        k,
        v,
        None,
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    """:func:`flash_attn_func` of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D)."""
    k, v = _parts("kv", kv, 2, "(batch, seqlen, 2, heads, head_dim)")
    return run(
        q,
        k,
        v,
        None,
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of qkv (T, 3, H, D), with one ``cu_seqlens`` int32 (B + 1,) for q, k and v."""
    del max_seqlen  # a hint: the paths read the lengths themselves
    q, k, v = _parts("qkv", qkv, 3, "(total_tokens, 3, heads, head_dim)")
    return run(
        q,
        k,
        v,
        PackedLayout(cu_seqlens, cu_seqlens, seqused_q, seqused_k),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    return_lse: bool = False,
    strict: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of q (Tq, H, D) and kv (Tk, 2, Hk, D)."""
    del max_seqlen_q, max_seqlen_k  # hints: the paths read the lengths themselves
    k, v = _parts("kv", kv, 2, "(total_tokens, 2, heads, head_dim)")
    return run(
        q,
        k,
        v,
        PackedLayout(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
        return_attn_probs,
        return_lse,
        strict,
    )


def _parts(name: str, packed: Tensor, count: int, shape: str) -> tuple[Tensor, ...]:
    """The ``count`` tensors along the third dimension from the end, as views."""
    if not isinstance(packed, Tensor):
        raise bad_argument(name, type(packed).__name__, "a torch.Tensor", "convert it with torch.as_tensor")
    if packed.dim() != shape.count(",") + 1 or packed.shape[-3] != count:
        raise bad_argument(
            name,
            f"shape {tuple(packed.shape)}",
            f"shape {shape}",
            f"stack the {count} tensors at dimension -3",
        )
    return packed.unbind(dim=-3)
