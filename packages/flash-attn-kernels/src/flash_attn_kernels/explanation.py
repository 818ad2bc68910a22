"""What a call would do, without doing it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import sm90
from .call import prepare
from .dispatch import Explanation
from .inputs import PackedLayout
from .kvcache_checks import check_caches
from .kvcache_operators import choose_operators


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Explanation:
    """Which path a call with these arguments takes, and why each faster one is passed over. Computes nothing.

    Takes the arguments of :func:`flash_attn_func`, and by keyword those that only :func:`flash_attn_varlen_func` has;
    ``cu_seqlens_q`` or ``cu_seqlens_k`` makes it a question about that function. The answer holds for the grad mode it
    is asked in, and for these addresses and strides; fake tensors have none and count as aligned.

    Raises:
        ValueError: as the functions themselves.
    """
    packed = None
    if not (
        cu_seqlens_q is None
        and cu_seqlens_k is None
        and block_table is None
        and seqused_q is None
        and seqused_k is None
    ):
        # An absent cu_seqlens is refused by name, as in the function asked about.
        packed = PackedLayout(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table)  # type: ignore[arg-type]
    q, k, v, *_, needs_gradient, _, explanation = prepare(
        q,
        k,
        v,
        packed,
        (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, causal_alignment),
        (attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink),
    )
    if explanation.path == "sm90" and not isinstance(q, torch._subclasses.FakeTensor):
        unaligned = sm90.unaligned_rows(q, k, v)
        if unaligned is not None:
            return Explanation("sm80", {"sm90": (unaligned,)})
    if explanation.path == "sm90" and needs_gradient:
        few_queries = sm90.few_queries(q, v, packed)
        if few_queries is not None:
            return replace(explanation, sm80_backward=(*explanation.sm80_backward, few_queries))
    return explanation


def explain_kvcache(k_cache: Tensor, v_cache: Tensor) -> Explanation:
    """Which path calls on these caches take: ``"cuda"``, the compiled kernels, or ``"portable"``, and why.

    Device, dtype and head dims of the caches decide, for :func:`flash_attn_with_kvcache` and :func:`append_kv` alike.

    Raises:
        ValueError: for tensors that are no caches.
    """
    check_caches(k_cache, v_cache, is_paged=False)
    operators = choose_operators(k_cache.device, k_cache.dtype, k_cache.shape[-1], v_cache.shape[-1])
    if operators.are_compiled:
        return Explanation("cuda", {})
    return Explanation("portable", {"cuda": operators.why_portable})
