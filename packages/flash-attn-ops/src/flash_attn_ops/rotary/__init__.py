"""Rotary position embedding (RoPE): dimensions in pairs, turned by an angle that grows with the position.

For the pair i of R/2 pairs and position p, with cos[p, i] and sin[p, i] from a table:

    out_first  = first * cos - second * sin
    out_second = first * sin + second * cos                       [Su et al. 2021, arXiv:2104.09864]

The pair (first, second) is dimensions (i, i + R/2) in the GPT-NeoX layout and (2i, 2i + 1) in the interleaved
GPT-J layout. Arithmetic is float32 (float64 for float64 x) whatever the inputs, autocast or not; the result
has x's dtype. One launch rotates queries and keys, as two tensors or as heads of one.
"""

from __future__ import annotations

from torch import Tensor

from .autograd import rotate_heads, rotate_pair
from .checks import Positions, Tables, check
from .module import RotaryEmbedding
from .packed import heads_of_packed, rotate_packed
from .scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
    from_hugging_face,
)

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "NTKScaling",
    "ProportionalScaling",
    "RotaryEmbedding",
    "Scaling",
    "YarnScaling",
    "apply_rotary_emb",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qk",
    "apply_rotary_emb_qkv_",
    "from_hugging_face",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotate the first R dimensions of every head; dimensions from R on pass through.

    Args:
        x: (B, S, H, D), or (T, H, D) with cu_seqlens. Any floating-point dtype and strides.
        cos, sin: (P, R/2) for positions 0 .. P - 1, R <= D, any floating-point dtype; constants for autograd.
        interleaved: pairs are neighbours (GPT-J) instead of halves (GPT-NeoX).
        inplace: write the result into x and return it. x needs a last dimension without gaps.
        seqlen_offsets: position of each sequence's first token; one int, or (B,) int32 or int64 on x's
            device.
        cu_seqlens: (B + 1,) int32 or int64, non-decreasing; sequence b is tokens cu_seqlens[b] up to, not
            including, cu_seqlens[b + 1] of x. Tokens outside every sequence are not rotated.
        max_seqlen: the longest sequence of cu_seqlens, if it is known: lets a table that is too short be
            refused here. It never changes the result.
        position_ids: (B, S), or (T,) for x (T, H, D), int32 or int64: the position of every token, instead of
            offsets and cu_seqlens.

    Returns:
        The rotated x, contiguous (x itself if inplace). Backward rotates the gradient by the negative angles.

    Raises:
        ValueError: arguments that do not fit, or a position that the table does not have. Positions that only
            the GPU knows (tensor offsets, cu_seqlens, position_ids) are not waited for: tokens beyond the table
            become NaN there.
    """
    tables, positions = Tables(cos, sin), Positions(seqlen_offsets, cu_seqlens, max_seqlen, position_ids)
    check({"x": x}, tables, positions, inplace)
    return rotate_heads(x, (x.shape[-2], 0), tables, positions, interleaved, inplace)


def apply_rotary_emb_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys of the same tokens in one launch.

    Args:
        q, k: (B, S, H, D) and (B, S, Hk, D), or (T, H, D) and (T, Hk, D) with cu_seqlens; each of any dtype and
            strides.
        cos, sin: the table, of queries and keys; or of queries only, with cos_k and sin_k, of the same shape, for
            keys.
        interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen, position_ids: see :func:`apply_rotary_emb`.

    Returns:
        ``(q, k)`` rotated.

    Raises:
        ValueError: as for :func:`apply_rotary_emb`.
    """
    tables = Tables(cos, sin, cos_k, sin_k)
    positions = Positions(seqlen_offsets, cu_seqlens, max_seqlen, position_ids)
    check({"q": q, "k": k}, tables, positions, inplace)
    return rotate_pair(q, k, tables, positions, interleaved, inplace)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotate the queries and keys of packed projections in place, in one launch.

    Args:
        qkv: (B, S, 3, H, D); or with num_heads_q (B, S, Hq + 2 Hk, D), queries before keys before values. With
            cu_seqlens, (T, ...) instead of (B, S, ...).
        cos, sin, cos_k, sin_k: see :func:`apply_rotary_emb_qk`.
        num_heads_q: Hq, which says that the heads are in one dimension.
        interleaved, seqlen_offsets, cu_seqlens, max_seqlen, position_ids: see :func:`apply_rotary_emb`.

    Returns:
        qkv itself.

    Raises:
        ValueError: as for :func:`apply_rotary_emb`.
    """
    tables = Tables(cos, sin, cos_k, sin_k)
    positions = Positions(seqlen_offsets, cu_seqlens, max_seqlen, position_ids)
    return rotate_packed(qkv, num_heads_q, tables, positions, interleaved, inplace=True)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotate the keys of packed keys and values in place.

    Args:
        kv: (B, S, 2, H, D), or (T, 2, H, D) with cu_seqlens.
        cos, sin, interleaved, seqlen_offsets, cu_seqlens, max_seqlen, position_ids: see :func:`apply_rotary_emb`.

    Returns:
        kv itself.

    Raises:
        ValueError: as for :func:`apply_rotary_emb`.
    """
    tables, positions = Tables(cos, sin), Positions(seqlen_offsets, cu_seqlens, max_seqlen, position_ids)
    heads = heads_of_packed("kv", kv, 2, inplace=True)
    check({"kv": heads}, tables, positions, True)
    return rotate_heads(kv, (kv.shape[-2], 0), tables, positions, interleaved, True)
