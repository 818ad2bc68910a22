"""Rotary embedding of queries and keys in one launch, both layouts, against eager torch and torch.compile.

Bytes that must move: q and k read once, the results written once, in either direction; the table is 1/40 of that or
less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from flash_attn_ops.rotary import apply_rotary_emb_qk
from memory_bound import ELEMENTS, Case, run
from torch import Tensor

HEAD_DIM, SEQLEN = 128, 4096


def torch_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As model code has it: the float32 table cast to the dtype of x, one rotated copy of x."""
    rotary_dim = 2 * cos.shape[1]
    x, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
        rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((table, table), dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    x = x * cos + rotated * sin
    return torch.cat((x, rest), dim=-1) if rest.shape[-1] else x


def make_case(heads: tuple[int, int], rotary_dim: int, interleaved: bool) -> Case:
    batch = ELEMENTS // (SEQLEN * sum(heads) * HEAD_DIM)
    angle = torch.rand(SEQLEN, rotary_dim // 2, device="cuda") * 6.3
    cos, sin = angle.cos(), angle.sin()

    def inputs() -> list[Tensor]:
        shapes = [(batch, SEQLEN, count, HEAD_DIM) for count in heads]
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb_qk(q, k, cos, sin, interleaved=interleaved)

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rotary(q, cos, sin, interleaved), torch_rotary(k, cos, sin, interleaved)

    moved = 4 * batch * SEQLEN * sum(heads) * HEAD_DIM
    description = {
        "layout": "interleaved" if interleaved else "halves",
        "heads": f"{heads[0]} + {heads[1]}",
        "rotary_dim": rotary_dim,
        "dtype": "bfloat16",
        "shape": f"({batch}, {SEQLEN}, H, {HEAD_DIM})",
    }
    contestants = {"ours": ours, "torch": theirs, "torch.compile": torch.compile(theirs, dynamic=False)}
    return Case(description, inputs, contestants, forward_bytes=moved, backward_bytes=moved)


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [((32, 8), 128, False), ((32, 32), 128, False), ((32, 8), 128, True), ((32, 8), 64, False)]
    return [partial(make_case, *size) for size in sizes[: 1 if quick else None]]


if __name__ == "__main__":
    run("rotary", __doc__.splitlines()[0], cases)
