"""Attention on a key-value cache in plain torch operations: any device and dtype, one sequence at a time.

Lengths are read on the host; for tensors on a GPU that is one synchronisation per call. Slots that a sequence does not
use are never read, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import blockwise
from .autocast import autocast_switched_off
from .blockwise_scores import Sequence, compute_dtype
from .combine import flash_attn_combine
from .inputs import ScoreModifiers
from .kvcache_append import append_kv
from .options import AttentionOptions

# Queries that are computed together under batch invariance. Each lies in the block, and at the place in it, that its
# position in the sequence says.
INVARIANT_QUERY_BLOCK = 16


@dataclass(frozen=True)
class _AlignedOptions(AttentionOptions):
    """Options of queries that see a part of the keys: query 0 lies on the diagonal of key ``shift`` of the part."""

    shift: int = 0

    def diagonal_shift(self, seqlen_q: int, seqlen_k: int) -> int:
        return self.shift


@dataclass(frozen=True)
class _CachedSequence:
    """One sequence: its queries, and where its keys are."""

    index: int
    queries: slice  # rows of packed q
    seqlen_q: int
    seqlen_k: int  # Sk, which aligns windows and ALiBi distances
    begin: int  # keys [begin, end) exist: behind the left padding, and inside the cache
    end: int
    row: int  # of the cache or of the block table


def append_and_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float = 0.0,
    num_splits: int = 0,
    batch_invariant: bool = False,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    interleaved: bool = True,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator, portably: an append, and :func:`decode` of the lengths that there are then."""
    # FlashAttention-2's rule: where all queries see the same keys, all have the position of the first.
    q_per_position = window_left >= 0 or window_right >= 0
    rotates = rotary_cos is not None
    rotated = append_kv(
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        q if rotates else None,
        rotary_cos,
        rotary_sin,
        interleaved,
        q_per_position,
        block_table,
        cache_batch_idx,
        cu_seqlens_q,
        cu_seqlens_k_new,
    )
    return decode(
        rotated if rotates else q,
        k_cache,
        v_cache,
        cache_seqlens + (k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff()),
        softmax_scale,
        window_left,
        window_right,
        softcap,
        num_splits,
        batch_invariant,
        block_table,
        cache_batch_idx,
        cu_seqlens_q,
        cache_leftpad,
        alibi_slopes,
        learnable_sink,
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float = 0.0,
    num_splits: int = 0,
    batch_invariant: bool = False,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator, portably: out in the layout of q, and lse (B, H, Sq) or (H, Tq) in compute precision.

    Keys are the first ``cache_seqlens[b]`` positions of each sequence. Rows of no sequence get 0 and -inf.
    """
    H, dtype = q.shape[-2], compute_dtype(q.dtype)
    lse_shape = (H, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], H, q.shape[1])
    out = q.new_zeros((*q.shape[:-1], v_cache.shape[-1]))
    lse = q.new_full(lse_shape, float("-inf"), dtype=dtype)
    options = _AlignedOptions(
        softmax_scale,
        None if window_left < 0 else window_left,
        None if window_right < 0 else window_right,
        softcap,
    )
    attend = _attend_invariantly if batch_invariant else _attend_in_parts
    with autocast_switched_off(q), torch.no_grad():
        for sequence in _sequences(
            q, k_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q
        ):
            b = sequence.index
            slopes = alibi_slopes
            if slopes is not None and slopes.shape[0] != 1:
                slopes = slopes[b : b + 1]
            modifiers = ScoreModifiers(alibi_slopes=slopes, learnable_sink=learnable_sink)
            if cu_seqlens_q is None:
                rows = q[b : b + 1], out[b : b + 1], lse[b : b + 1]
            else:
                packed = sequence.queries
                rows = q[packed].unsqueeze(0), out[packed].unsqueeze(0), lse[:, packed].unsqueeze(0)
            keys = _gather_keys(sequence, k_cache, v_cache, block_table)
            attend(sequence, *rows, *keys, options, modifiers, max(num_splits, 1))
    return out, lse


def _sequences(
    q: Tensor,
    k_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
) -> Iterator[_CachedSequence]:
    batch = seqlens_k.shape[0]
    index = torch.arange(batch, device=q.device)
    columns = [
        index if cache_batch_idx is None else cache_batch_idx,
        torch.zeros_like(index) if cache_leftpad is None else cache_leftpad,
        seqlens_k,
        index * q.shape[1] if cu_seqlens_q is None else cu_seqlens_q[:-1],
        (index + 1) * q.shape[1] if cu_seqlens_q is None else cu_seqlens_q[1:],
    ]
    tokens = q.shape[0] if cu_seqlens_q is not None else q.shape[0] * q.shape[1]
    rows, capacity = k_cache.shape[:2]
    if block_table is not None:
        rows, capacity = block_table.shape[0], block_table.shape[1] * capacity
    for b, (row, leftpad, seqlen_k, query_begin, query_end) in enumerate(
        torch.stack([x.long() for x in columns], dim=1).tolist()
    ):
        # Out of range is what no cache has: such keys do not exist, nor do such queries.
        end = max(0, min(seqlen_k, capacity)) if 0 <= row < rows else 0
        begin = min(max(leftpad, 0), end)
        query_begin, query_end = (max(0, min(n, tokens)) for n in (query_begin, query_end))
        queries = slice(query_begin, max(query_begin, query_end))
        yield _CachedSequence(b, queries, queries.stop - queries.start, seqlen_k, begin, end, row)


def _gather_keys(
    sequence: _CachedSequence, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [begin, end) as (1, keys, Hk, D): views, or copies of pages; and which exist, None for all.

    A page number out of range has no keys.
    """
    begin, end = sequence.begin, sequence.end
    if begin == end:
        return k_cache[:1, :0], v_cache[:1, :0], None
    if block_table is None:
        row = slice(sequence.row, sequence.row + 1)
        return k_cache[row, begin:end], v_cache[row, begin:end], None
    num_pages, page_size = k_cache.shape[:2]
    first_page = begin // page_size
    pages = block_table[sequence.row, first_page : -(-end // page_size)].long()
    inside = slice(begin - first_page * page_size, end - first_page * page_size)
    is_page = (pages >= 0) & (pages < num_pages)
    if is_page.all():
        k, v = (x[pages].flatten(0, 1)[inside].unsqueeze(0) for x in (k_cache, v_cache))
        return k, v, None
    exists = is_page.repeat_interleave(page_size)[inside].unsqueeze(0)
    if num_pages == 0:
        k, v = (x.new_zeros((1, end - begin, *x.shape[2:])) for x in (k_cache, v_cache))
        return k, v, exists
    pages = pages.clamp(0, num_pages - 1)
    k, v = (x[pages].flatten(0, 1)[inside].unsqueeze(0) for x in (k_cache, v_cache))
    return k, v, exists


def _attend_in_parts(
    sequence: _CachedSequence,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    exists: Tensor | None,
    options: _AlignedOptions,
    modifiers: ScoreModifiers,
    num_parts: int,
) -> None:
    """Fill out and lse from the keys in ``num_parts`` parts of nearly one size, computed one by one and combined."""
    keys = sequence.end - sequence.begin
    shift = sequence.seqlen_k - sequence.seqlen_q - sequence.begin  # of query 0, counted from key ``begin``
    if num_parts == 1:
        _fill(q, out, lse, k, v, exists, replace(options, shift=shift), modifiers)
        return
    out_partial = out.new_empty((num_parts, *out.shape), dtype=lse.dtype)
    lse_partial = lse.new_empty((num_parts, *lse.shape))
    for n in range(num_parts):
        part = slice(n * keys // num_parts, (n + 1) * keys // num_parts)
        _fill(
            q,
            out_partial[n],
            lse_partial[n],
            k[:, part],
            v[:, part],
            None if exists is None else exists[:, part],
            replace(options, shift=shift - part.start),
            modifiers if n == 0 else modifiers._replace(learnable_sink=None),
        )
    combined = flash_attn_combine(out_partial, lse_partial)
    out.copy_(combined[0])
    lse.copy_(combined[1])


def _attend_invariantly(
    sequence: _CachedSequence,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    exists: Tensor | None,
    options: _AlignedOptions,
    modifiers: ScoreModifiers,
    num_parts: int,
) -> None:
    """Fill out and lse so that the bits of a row depend on its position, its query and the keys it sees alone.

    Matrix products of different shapes sum in different orders, and so may different rows of one product. So a query
    always lies in the same row of a block of one size, and the keys that this block meets, from position 0 on, number
    the same whatever else is in the call. Keys that are not there are zeros with weight 0: exact zeros in every sum.
    """
    rows, first = INVARIANT_QUERY_BLOCK, sequence.seqlen_k - sequence.seqlen_q  # position of query 0
    longest = sequence.end + rows
    k, v = (_padded(x, sequence.begin, longest) for x in (k, v))
    real = torch.zeros((1, longest), dtype=torch.bool, device=q.device)
    real[:, sequence.begin : sequence.end] = True if exists is None else exists
    for block in range(first // rows, -(-(first + sequence.seqlen_q) // rows)):
        block_begin = block * rows
        # What a causal or windowed block can see at most: so many keys, also if some of them have yet to be appended.
        # A row that sees all keys is the same row only in calls with as many keys.
        seqlen = sequence.end
        if options.window_right is not None:
            seqlen = max(0, min(block_begin + rows + options.window_right, longest))
        begin = max(block_begin, first)
        end = min(block_begin + rows, first + sequence.seqlen_q)
        places, queries = slice(begin - block_begin, end - block_begin), slice(begin - first, end - first)
        q_block = q.new_zeros((1, rows, *q.shape[2:]))
        q_block[:, places] = q[:, queries]
        out_block = q.new_zeros((1, rows, *out.shape[2:]))
        lse_block = lse.new_zeros((1, lse.shape[1], rows))
        _fill(
            q_block,
            out_block,
            lse_block,
            k[:, :seqlen],
            v[:, :seqlen],
            real[:, :seqlen],
            replace(options, shift=block_begin),
            modifiers,
        )
        # Sums that differ in zeros may differ in the sign of a zero result.
        out[:, queries] = out_block[:, places] + 0.0
        lse[:, :, queries] = lse_block[:, :, places]


def _padded(x: Tensor, begin: int, length: int) -> Tensor:
    """(1, length, Hk, D) with x from position ``begin`` on and zeros elsewhere."""
    padded = x.new_zeros((1, length, *x.shape[2:]))
    padded[:, begin : begin + x.shape[1]] = x
    return padded


def _fill(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    exists: Tensor | None,
    options: AttentionOptions,
    modifiers: ScoreModifiers,
) -> None:
    if exists is not None:
        modifiers = modifiers._replace(key_padding_mask=exists)
    blockwise.forward(Sequence(q, k, v, options, modifiers), out, lse)
