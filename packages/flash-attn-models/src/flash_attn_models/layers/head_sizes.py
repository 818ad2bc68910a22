"""The sizes of attention heads, checked."""

from __future__ import annotations

from flash_attn_models.errors import bad_argument


def head_sizes(d_model: int, n_head: int, n_head_kv: int | None, d_head: int | None) -> tuple[int, int]:
    """Key/value heads and the width of a head, where None is ``n_head`` and ``d_model / n_head``.

    Raises:
        ValueError: key/value heads that do not divide the query heads; heads that do not divide the width, and have
            none of their own.
    """
    if n_head < 1:
        raise bad_argument("n_head", n_head, "at least 1", "give the number of query heads")
    heads_kv = n_head if n_head_kv is None else n_head_kv
    if heads_kv < 1 or n_head % heads_kv != 0:
        raise bad_argument("n_head_kv", n_head_kv, f"a divisor of n_head={n_head}", "change one of them")
    if d_head is None and d_model % n_head != 0:
        raise bad_argument(
            "d_model", d_model, f"a multiple of n_head={n_head}", "change one of them, or give d_head"
        )
    return heads_kv, d_model // n_head if d_head is None else d_head
