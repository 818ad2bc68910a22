"""Attention of q, k and v that lie in one tensor, or k and v in one: views of it, no copies.

Names, order of tensors and keywords are FlashAttention-2.8's; what goes beyond them is keyword-only. The options are
those of :func:`flash_attn_func` and :func:`flash_attn_varlen_func`, and so are the results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .autograd import split_heads
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
    num_heads_q: int | None = None,
) -> Any:
    """:func:`flash_attn_func` of qkv (B, S, 3, H, D); with ``num_heads_q`` H of qkv (B, S, H + 2 Hk, D).

    The gradient of qkv is made in one piece, which that of three separate tensors is not.
    """
    heads, q, k, v = _heads_of(qkv, num_heads_q, ("batch", "seqlen"))
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
        heads,
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
    num_heads_q: int | None = None,
) -> Any:
    """:func:`flash_attn_varlen_func` of qkv (T, 3, H, D), with one ``cu_seqlens`` int32 (B + 1,) for q, k and v.

    With ``num_heads_q`` H it is (T, H + 2 Hk, D).
    """
    del max_seqlen  # a hint: the paths read the lengths themselves
    heads, q, k, v = _heads_of(qkv, num_heads_q, ("total_tokens",))
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
        heads,
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


def _heads_of(
    qkv: Tensor, num_heads_q: int | None, tokens: tuple[str, ...]
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """qkv as (..., H + 2 Hk, D), and q, k and v as views; the first is None where it would be a copy."""
    if num_heads_q is None:
        q, k, v = _parts("qkv", qkv, 3, f"({', '.join(tokens)}, 3, heads, head_dim)")
        follow_each_other = qkv.stride(-3) == qkv.shape[-2] * qkv.stride(-2)
        return qkv.flatten(-3, -2) if follow_each_other else None, q, k, v
    shape = f"({', '.join(tokens)}, num_heads_q + 2 * num_heads_kv, head_dim)"
    if not isinstance(qkv, Tensor):
        raise bad_argument("qkv", type(qkv).__name__, "a torch.Tensor", "convert it with torch.as_tensor")
    if qkv.dim() != len(tokens) + 2:
        raise bad_argument(
            "qkv",
            f"shape {tuple(qkv.shape)}",
            f"shape {shape}",
            "leave num_heads_q out for qkv with a dimension of 3",
        )
    if isinstance(num_heads_q, bool) or not isinstance(num_heads_q, int) or num_heads_q < 1:
        raise bad_argument(
            "num_heads_q", repr(num_heads_q), "a positive int", "pass how many of the heads are queries"
        )
    others = qkv.shape[-2] - num_heads_q
    if others < 2 or others % 2:
        raise bad_argument(
            "num_heads_q",
            f"{num_heads_q} of {qkv.shape[-2]} heads",
            "an even number of further heads, keys and values",
            "pass how many of the heads are queries",
        )
    return qkv, *split_heads(qkv, num_heads_q)
