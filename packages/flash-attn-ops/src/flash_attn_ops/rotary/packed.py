"""Packed projections, taken as heads of one tensor."""

from __future__ import annotations

from torch import Tensor

from flash_attn_ops.arguments import bad_argument, check_given

from .autograd import rotate_heads
from .checks import Positions, Tables, check


def rotate_packed(
    qkv: Tensor,
    num_heads_q: int | None,
    tables: Tables,
    positions: Positions,
    interleaved: bool,
    inplace: bool,
) -> Tensor:
    """Queries and keys of packed projections rotated, in place or not: (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) with
    num_heads_q; (T, ...) if packed sequences."""
    check_given(qkv=qkv)
    if num_heads_q is None:
        heads = heads_of_packed("qkv", qkv, 3, inplace)
        num_first = num_second = qkv.shape[-2]
    else:
        heads, num_first = qkv, num_heads_q
        num_others = qkv.shape[-2] - num_heads_q if qkv.dim() >= 2 else -1
        if num_heads_q <= 0 or num_others < 0 or num_others % 2:
            got = f"{num_heads_q}, for qkv of shape {tuple(qkv.shape)}"
            expected = "Hq of (..., Hq + 2 Hk, D)"
            raise bad_argument("num_heads_q", got, expected, "pass the number of query heads")
        num_second = num_others // 2
    check({"qkv": heads}, tables, positions, inplace)
    return rotate_heads(qkv, (num_first, num_second), tables, positions, interleaved, inplace)


def heads_of_packed(name: str, packed: Tensor, parts: int, inplace: bool) -> Tensor:
    """(..., parts, H, D) as (..., parts * H, D), a view if it is to be overwritten."""
    check_given(**{name: packed})
    if packed.dim() < 4 or packed.shape[-3] != parts:
        expected = f"(B, S, {parts}, H, D) or (T, {parts}, H, D)"
        fix = "stack the parts" if name == "kv" else "stack the parts, or give num_heads_q"
        raise bad_argument(name, f"shape {tuple(packed.shape)}", expected, fix)
    heads, stride = packed.shape[-2], packed.stride()
    if inplace and packed.numel() and stride[-3] != heads * stride[-2]:
        fix = "pass a contiguous tensor, or rotate its parts by themselves"
        raise bad_argument(name, f"strides {stride}", "heads of equal distance", fix)
    return packed.flatten(-3, -2)
