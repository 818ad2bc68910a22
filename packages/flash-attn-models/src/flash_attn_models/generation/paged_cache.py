"""Paged key/value cache: sequences take pages from a pool, only as many as they need, and give them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.kv_cache import Cache


class PagePool:
    """Pages of ``page_size`` tokens, for the keys and values of all layers, and which of them are free.

    The memory is 2 n_layer n_pages page_size Hk D elements, allocated once.

    Attributes:
        k, v: (n_pages,page_size,Hk,D) by layer.
    """

    @torch.inference_mode(False)  # it may serve outside of the caller's mode, too
    def __init__(
        self,
        n_layer: int,
        n_pages: int,
        page_size: int,
        n_head_kv: int,
        d_head: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (n_pages, page_size, n_head_kv, d_head)
        if min(n_layer, *shape) < 1:
            raise bad_argument(
                "PagePool",
                f"n_layer={n_layer}, (n_pages, page_size, n_head_kv, d_head)={shape}",
                "sizes of at least 1",
                "change what is smaller than 1",
            )
        self.page_size = page_size
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self._free = list(reversed(range(n_pages)))

    @property
    def n_free(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """Pages that so many tokens of one sequence need."""
        return -(-n_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Numbers of ``count`` free pages, which are free no longer. ValueError, and nothing taken, if there are
        fewer."""
        if count > len(self._free):
            raise bad_argument(
                "cache",
                f"a pool with {len(self._free)} free of {len(self.k[0])} pages",
                f"the {count} pages of {self.page_size} tokens that these sequences need",
                "make a larger pool, free() other caches of it, or ask for fewer sequences or tokens",
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Make pages free again."""
        self._free.extend(pages)


class PagedKVCache(Cache):
    """A cache of sequences that need not have room for equally many tokens, in pages of a pool.

    All pages are taken at once, so that decoding changes nothing on the host; tokens beyond a sequence's room are not
    kept. ``free`` gives them back; the cache is of no use afterwards.

    Args:
        pool: whose pages to take.
        max_seqlens: for each sequence the tokens it must have room for.
        table_columns: of the block table, if it shall have more than the longest sequence needs.
    """

    def __init__(
        self, pool: PagePool, max_seqlens: Sequence[int], *, table_columns: int | None = None
    ) -> None:
        if not max_seqlens or min(max_seqlens) < 1:
            raise bad_argument(
                "max_seqlens",
                list(max_seqlens),
                "at least 1 token for each of at least 1 sequence",
                "leave out what is empty",
            )
        counts = [pool.pages_for(seqlen) for seqlen in max_seqlens]
        self._pool = pool
        self._pages = pool.take(sum(counts))
        pages = iter(self._pages)
        # Page -1 does not exist: padding that is written behind a short prompt is lost there.
        columns = max(max(counts), table_columns or 0)
        rows = [[next(pages) for _ in range(count)] + [-1] * (columns - count) for count in counts]
        table = torch.tensor(rows, dtype=torch.int32, device=pool.k[0].device)
        super().__init__(pool.k, pool.v, len(counts), max(max_seqlens), table)

    def free(self) -> None:
        """Give all pages back to the pool; a second time it does nothing."""
        self._pool.give_back(self._pages)
        self._pages = []
