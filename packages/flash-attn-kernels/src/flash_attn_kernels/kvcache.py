"""Attention on a key-value cache: what serving and generation call. Inference only.

Names, order of tensors and keywords of ``flash_attn_with_kvcache`` are FlashAttention-2.8's; what goes beyond them is
keyword-only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import bad_argument
from .kvcache_call import CacheOptions, append, attend
from .kvcache_inputs import CacheTensors


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
    strict: bool = False,
) -> Any:
    """Append new keys and values to a cache, in place, and attend to all that it then holds.

    Key j of sequence b is visible to query i iff ``leftpad <= j < Sk`` and
    ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``, where Sk is ``cache_seqlens[b]`` plus the number of new keys.
    Prefill, a chunk of it, decoding and verifying drafts are this one call with different Sq, also in one batch.
    There is no gradient: one that is needed is refused; call it under ``torch.no_grad()`` or
    ``torch.inference_mode()``.

    Args:
        q: (B, Sq, H, D), or packed (Tq, H, D) with ``cu_seqlens_q``. float16, bfloat16, float32 or float64, the same
            for q, k, v and the caches (autocast casts q, k and v to the dtype of the caches). Any strides.
        k_cache: (B_cache, S_cache, Hk, D), or pages (num_pages, page_size, Hk, D) with ``block_table``; H is a
            multiple of Hk, and query head h reads key head ``h // (H / Hk)``. Any strides with a contiguous last
            dimension. v_cache: likewise, (..., Hk, Dv). B_cache is B unless ``cache_batch_idx`` is given.
            Positions from Sk on, pages that hold no position before Sk, and what is before ``leftpad`` may hold NaN.
        k: (B, Snew, Hk, D), or packed (Tnew, Hk, D): new keys, written to positions ``cache_seqlens[b]`` and on; no
            two sequences may write one slot. v: likewise, (..., Hk, Dv).
        rotary_cos: (S_rot, rotary_dim / 2), in float32 or the dtype of the cache, with S_rot at least the capacity of
            a sequence: rotate the first rotary_dim <= D elements of every head of k and q, computed in fp32 (fp64 for
            fp64); only together with k. A key is rotated at its position in the cache, which left padding does not
            shift; query i at ``cache_seqlens[b] + i`` if ``causal`` or a window is given, otherwise every query at
            ``cache_seqlens[b]``. rotary_sin: likewise.
        cache_seqlens: int32 (B,), or one int for all: lengths **before** the append. Without k, None is all that there
            is room for.
        cache_batch_idx: int32 (B,): sequence b uses row ``cache_batch_idx[b]`` of the caches or of ``block_table``.
        cache_leftpad: int32 (B,): the first positions of a sequence that are padding.
        block_table: int32 (B, max_pages), or as many rows as ``cache_batch_idx`` points to: position t of a sequence
            is row ``t % page_size`` of page ``block_table[b, t // page_size]``. Pages of any size, in any order;
            sequences may share pages that none of them appends to.
        softmax_scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: right = 0. window_size: ``(left, right)``; -1 is unbounded.
        softcap: products become ``softcap * tanh(softmax_scale * q k^T / softcap)``; 0 is off.
        rotary_interleaved: pairs are neighbours (GPT-J); False: an element and the one ``rotary_dim / 2`` further on
            (GPT-NeoX, LLaMA).
        alibi_slopes: (H,) or (B, H); adds ``-slope * |i + Sk - Sq - j|`` to the scores.
        num_splits: the keys of a sequence are split into exactly so many parts, whose results are combined; 1 is no
            split. 0 is chosen: by the lengths on the device, and long chunks of a prefill run on the kernels that
            training uses.
        return_softmax_lse: return ``(out, lse)``.
        learnable_sink: (H,), one more logit in every softmax of head h, without a value.
        cu_seqlens_q: int32 (B + 1,), cumulative query lengths starting at 0.
        max_seqlen_q: capacity hint; it never changes results.
        cu_seqlens_k_new: int32 (B + 1,), cumulative lengths of packed k and v; None is ``cu_seqlens_q``.
        batch_invariant: the bits of a row do not depend on batch size, on its place in the batch, on the rest of the
            batch, or on the chunks in which a causal prefill came. They do on the position in the cache, and so on the
            left padding. ``num_splits`` is then 0 or 1.
        validate: read lengths, rows and pages, with a synchronisation on a GPU, and raise if one is out of range: a
            page that is used, ``cache_seqlens`` + new keys above the capacity, ``cache_batch_idx``, ``cache_leftpad``
            above Sk, one slot written by two sequences. Not inside torch.compile. Without it, out-of-range data never
            touches other memory: what has no place is not written, and what is not there is not visible.
        strict: raise if no compiled kernel runs the call, instead of warning.

    Returns:
        out (B, Sq, H, Dv) or (Tq, H, Dv) in the dtype of q; with ``return_softmax_lse`` also lse (B, H, Sq) or
        (H, Tq), in fp32 (fp64 for fp64), the natural logarithm of the softmax denominator. A query that sees no key
        gets 0 and -inf (the logit of the sink, if there is one); packed rows of no sequence 0 and -inf.

    Raises:
        ValueError: for tensors or options that do not fit together, naming the argument and the fix, if a gradient is
            needed, and as ``validate`` and ``strict`` say; always before anything is written.

    Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient
    memory management for large language model serving with PagedAttention", 2023.
    """
    del max_seqlen_q  # a hint: the paths read the lengths themselves
    if q is None:
        raise bad_argument("q", "None", "queries", "to append only, call append_kv")
    out, lse = attend(
        CacheTensors(
            k_cache,
            v_cache,
            cache_seqlens,
            q,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            cu_seqlens_q,
            cu_seqlens_k_new,
            alibi_slopes,
            learnable_sink,
        ),
        CacheOptions(
            softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits, batch_invariant
        ),
        validate,
        strict,
    )
    return (out, lse) if return_softmax_lse else out


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor | int,
    *,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotate_q_per_position: bool = True,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    validate: bool = False,
    strict: bool = False,
) -> Tensor | None:
    """Write new keys and values into a cache, in place, rotating keys and queries on the way if asked to.

    The first half of :func:`flash_attn_with_kvcache`: calling that afterwards, without k, with the lengths that the
    cache has then and the rotated q, does the other half. An operator of its own, which declares what it writes, for
    torch.compile and torch.export.

    Args:
        q: queries to rotate, only with ``rotary_cos``: (B, Sq, H, D), or packed with ``cu_seqlens_q``.
        rotate_q_per_position: query i is rotated at ``cache_seqlens[b] + i``; False: every query at
            ``cache_seqlens[b]``.

    The other arguments are those of :func:`flash_attn_with_kvcache`.

    Returns:
        The rotated q, a new contiguous tensor, or None without q.

    Raises:
        ValueError: as :func:`flash_attn_with_kvcache`, before anything is written.

    Source: rotary embedding by Su et al., "RoFormer", 2021.
    """
    if k is None:
        raise bad_argument("k", "None", "new keys", "skip the call: there is nothing to append")
    if q is not None and rotary_cos is None:
        raise bad_argument("q", "queries without rotary tables", "None", "pass rotary_cos and rotary_sin too")
    return append(
        CacheTensors(
            k_cache,
            v_cache,
            cache_seqlens,
            q,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_batch_idx,
            None,
            block_table,
            cu_seqlens_q,
            cu_seqlens_k_new,
        ),
        rotary_interleaved,
        rotate_q_per_position,
        validate,
        strict,
    )
