"""Appending to a key-value cache in plain torch operations, with rotary embedding on the way: any device and dtype.

Positions that the cache does not have, rows and pages out of range take no write: nothing outside is ever touched.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .blockwise_scores import compute_dtype


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    interleaved: bool = True,
    q_per_position: bool = True,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
) -> Tensor:
    """Write k and v behind the first ``cache_seqlens[b]`` positions of each sequence; the operator, portably.

    k and v are (B, Snew, Hk, D), or packed with ``cu_seqlens_k_new``; q likewise with ``cu_seqlens_q``. New keys are
    rotated at their position in the cache; query i at ``cache_seqlens[b] + i``, or with ``q_per_position`` False at
    ``cache_seqlens[b]``.

    Returns:
        The rotated q, new and contiguous; an empty tensor (0,) without q.
    """
    sequence, offset = _sequence_and_offset(k, cu_seqlens_k_new, cache_seqlens.shape[0])
    position, exists = _position(sequence, offset, cache_seqlens)
    row, slot, exists = _slots(position, sequence, exists, k_cache, cache_batch_idx, block_table)
    kept = exists.nonzero().squeeze(1)
    new_k, new_v = k.flatten(0, -3)[kept], v.flatten(0, -3)[kept]
    if rotary_cos is not None and rotary_sin is not None:
        new_k = rotate(new_k, rotary_cos, rotary_sin, position[kept], interleaved)
    _write(k_cache, row[kept], slot[kept], new_k)
    _write(v_cache, row[kept], slot[kept], new_v)
    if q is None:
        return k_cache.new_empty(0)
    if rotary_cos is None or rotary_sin is None:
        return q.clone(memory_format=torch.contiguous_format)
    sequence, offset = _sequence_and_offset(q, cu_seqlens_q, cache_seqlens.shape[0])
    position, _ = _position(sequence, offset if q_per_position else torch.zeros_like(offset), cache_seqlens)
    return rotate(q.flatten(0, -3), rotary_cos, rotary_sin, position, interleaved).reshape(q.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., 2021) of token rows (N, H, D), each at its position, as a new tensor.

    The first ``2 * cos.shape[1]`` elements of a head are turned as pairs: neighbours if ``interleaved``, otherwise
    element i of their first half with element i of their second half. Computed in fp32, or fp64 for fp64.
    """
    dtype = compute_dtype(x.dtype)
    # Only out-of-range data reaches past the tables; whatever it gets, it must not be read from outside of them.
    position = position.clamp(0, cos.shape[0] - 1)
    cos, sin = (table[position].unsqueeze(1).to(dtype) for table in (cos, sin))
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    rotated = x.clone(memory_format=torch.contiguous_format)
    rotated[..., first] = (a * cos - b * sin).to(x.dtype)
    rotated[..., second] = (a * sin + b * cos).to(x.dtype)
    return rotated


def _write(cache: Tensor, row: Tensor, slot: Tensor, new: Tensor) -> None:
    """A cache that was made under inference_mode is written outside of it too, as the compiled operators do."""
    with torch.inference_mode() if cache.is_inference() else nullcontext():
        cache.index_put_((row, slot), new)


def _sequence_and_offset(x: Tensor, cu_seqlens: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Of every token of x, in order: its sequence (outside [0, batch) if in none) and its place among the tokens."""
    if cu_seqlens is None:
        index = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        length = max(x.shape[1], 1)
        return index // length, index % length
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return sequence, token - cu_seqlens[sequence.clamp(0, batch)]


def _position(sequence: Tensor, offset: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the cache, and whether the token is in a sequence at all."""
    batch = cache_seqlens.shape[0]
    exists = (sequence >= 0) & (sequence < batch)
    if batch == 0:
        return offset, exists
    return cache_seqlens[sequence.clamp(0, batch - 1)].long() + offset, exists


def _slots(
    position: Tensor,
    sequence: Tensor,
    exists: Tensor,
    k_cache: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row (or page) and slot of each position, and whether there is such a one. The others get numbers to ignore."""
    row = sequence
    if cache_batch_idx is not None and cache_batch_idx.shape[0] > 0:
        row = cache_batch_idx[sequence.clamp(0, cache_batch_idx.shape[0] - 1)].long()
    slots = k_cache.shape[1]
    if block_table is None:
        exists = exists & (row >= 0) & (row < k_cache.shape[0]) & (position >= 0) & (position < slots)
        return row, position, exists
    rows, max_pages = block_table.shape
    exists = exists & (row >= 0) & (row < rows) & (position >= 0) & (position < max_pages * slots)
    if rows == 0 or max_pages == 0:
        return row, position, exists
    page = block_table[row.clamp(0, rows - 1), (position // slots).clamp(0, max_pages - 1)].long()
    return page, position % slots, exists & (page >= 0) & (page < k_cache.shape[0])
