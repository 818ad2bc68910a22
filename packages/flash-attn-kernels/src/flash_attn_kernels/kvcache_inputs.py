"""The tensors of a call on a key-value cache, and what their shapes say."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CacheTensors(NamedTuple):
    """Everything that a call on a cache may be given; None where there is no such thing.

    A cache is (B_cache, S_cache, Hk, D), one row per sequence, or pages (num_pages, page_size, Hk, D) with a
    ``block_table``. Sequence b uses row b of the cache or of the table, or row ``cache_batch_idx[b]``.
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor | int | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    alibi_slopes: Tensor | None = None
    learnable_sink: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of sequences."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1
        if self.q is not None:
            return self.q.shape[0]
        if self.cu_seqlens_k_new is not None:
            return self.cu_seqlens_k_new.shape[0] - 1
        assert self.k is not None, "a call has queries or new keys"
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        """Positions that one sequence has room for."""
        slots = self.k_cache.shape[1]
        return slots if self.block_table is None else self.block_table.shape[1] * slots

    @property
    def cu_seqlens_new(self) -> Tensor | None:
        """Cumulative lengths of packed new keys: those of the queries unless they have their own. None if dense."""
        if self.k is None or self.k.dim() == 4:
            return None
        return self.cu_seqlens_q if self.cu_seqlens_k_new is None else self.cu_seqlens_k_new
