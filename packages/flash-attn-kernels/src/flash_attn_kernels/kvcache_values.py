"""Checks of the values in a call on a key-value cache: made on request, since reading them synchronises with a GPU."""

from __future__ import annotations

from torch import Tensor

from .errors import bad_argument
from .kvcache_inputs import CacheTensors


def check_values(tensors: CacheTensors, *, attends: bool) -> None:
    """What only the values tell: lengths, rows and pages are in range; those that are written and, if the call
    ``attends``, those that are read.

    Raises:
        ValueError: for the first sequence that does not fit.
    """
    batch, capacity = tensors.batch, tensors.capacity
    _check_cumulative("cu_seqlens_q", tensors.cu_seqlens_q, None if tensors.q is None else tensors.q.shape[0])
    new = [0] * batch
    if tensors.k is not None:
        cu_seqlens = tensors.cu_seqlens_new
        if cu_seqlens is None:
            new = [tensors.k.shape[1]] * batch
        else:
            name = "cu_seqlens_q" if tensors.cu_seqlens_k_new is None else "cu_seqlens_k_new"
            _check_cumulative(name, cu_seqlens, tensors.k.shape[0])
            new = cu_seqlens.diff().tolist()
    lengths = _listed(tensors.cache_seqlens, batch, capacity)
    leftpads = _listed(tensors.cache_leftpad, batch, 0)
    rows = list(range(batch)) if tensors.cache_batch_idx is None else tensors.cache_batch_idx.tolist()
    table = None if tensors.block_table is None else tensors.block_table.tolist()
    num_rows = tensors.k_cache.shape[0] if table is None else len(table)
    for b, (length, more, leftpad, row) in enumerate(zip(lengths, new, leftpads, rows, strict=True)):
        if not 0 <= row < num_rows:
            raise bad_argument(
                "cache_batch_idx", f"{row} for sequence {b}", f"rows in [0, {num_rows})", "check the rows"
            )
        if length < 0 or length + more > capacity:
            raise bad_argument(
                "cache_seqlens",
                f"{length} for sequence {b}, and {more} new keys",
                f"a length >= 0 that leaves room for them in {capacity} positions",
                "make the cache longer, or drop keys",
            )
        if not 0 <= leftpad <= length + more:
            raise bad_argument(
                "cache_leftpad",
                f"{leftpad} for sequence {b}",
                f"at most its {length + more} keys",
                "count the padding only",
            )
        if table is not None:
            _check_pages(tensors, b, table[row], min(leftpad, length) if attends else length, length + more)
    if tensors.k is not None:
        _check_written_once(tensors, rows, lengths, new, table)
    _check_rotary_of_queries(tensors, lengths)


def _check_cumulative(name: str, cu_seqlens: Tensor | None, tokens: int | None) -> None:
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends):
        raise bad_argument(name, ends[:8], "cumulative lengths that start at 0 and never fall", "use cumsum")
    if tokens is not None and ends[-1] > tokens:
        raise bad_argument(name, f"a total of {ends[-1]}", f"at most {tokens} tokens", "check the lengths")


def _listed(x: Tensor | int | None, batch: int, otherwise: int) -> list[int]:
    if isinstance(x, Tensor):
        return x.tolist()
    return [otherwise if x is None else int(x)] * batch


def _check_pages(tensors: CacheTensors, b: int, row: list[int], begin: int, end: int) -> None:
    """The pages of positions [begin, end) exist."""
    num_pages, page_size = tensors.k_cache.shape[:2]
    pages = row[begin // page_size : -(-end // page_size)]
    if any(not 0 <= page < num_pages for page in pages):
        raise bad_argument(
            "block_table",
            f"{pages[:8]} for sequence {b}",
            f"pages in [0, {num_pages})",
            "check the page table",
        )


def _check_written_once(
    tensors: CacheTensors, rows: list[int], lengths: list[int], new: list[int], table: list[list[int]] | None
) -> None:
    """No slot gets the new keys of two sequences: which of them stayed would be a matter of chance."""
    page_size = tensors.k_cache.shape[1]
    writers: dict[tuple[int, int], int] = {}
    for b, (row, length, more) in enumerate(zip(rows, lengths, new, strict=True)):
        for position in range(length, length + more):
            slot = (row, position)
            if table is not None:
                slot = (table[row][position // page_size], position % page_size)
            other = writers.setdefault(slot, b)
            if other != b:
                raise bad_argument(
                    "cache_batch_idx" if table is None else "block_table",
                    f"one slot of the cache for new keys of sequences {other} and {b}",
                    "slots of its own for each sequence that appends",
                    "copy a shared page before appending to it",
                )


def _check_rotary_of_queries(tensors: CacheTensors, lengths: list[int]) -> None:
    """Queries may be more than the new keys: their positions then reach further."""
    if tensors.rotary_cos is None or tensors.q is None:
        return
    if tensors.cu_seqlens_q is None:
        queries = [tensors.q.shape[1]] * len(lengths)
    else:
        queries = tensors.cu_seqlens_q.diff().tolist()
    last = max((length + n for length, n in zip(lengths, queries, strict=True)), default=0)
    if last > tensors.rotary_cos.shape[0]:
        raise bad_argument(
            "rotary_cos",
            f"{tensors.rotary_cos.shape[0]} positions",
            f"at least {last}, for the queries",
            "make longer tables",
        )
