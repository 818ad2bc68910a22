"""Rotary embedding of queries, both layouts, against eager torch and torch.compile.

Bytes that must move: x read once, the result written once, in either direction; the table is 1/32 of a row of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from flash_attn_ops.rotary import apply_rotary_emb
from memory_bound import ELEMENTS, Case, run
from torch import Tensor

HEADS, HEAD_DIM = 32, 128


def torch_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As model code has it: the float32 table cast to the dtype of x, one rotated copy of x."""
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
        rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat((table, table), dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    return x * cos + rotated * sin


def make_case(rotary_dim: int, interleaved: bool, seqlen: int) -> Case:
    batch = ELEMENTS // (seqlen * HEADS * HEAD_DIM)
    angle = torch.rand(seqlen, rotary_dim // 2, device="cuda") * 6.3
    cos, sin = angle.cos(), angle.sin()

    def inputs() -> list[Tensor]:
        shape = (batch, seqlen, HEADS, HEAD_DIM)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()]

    def ours(x: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos, sin, interleaved)

    def theirs(x: Tensor) -> Tensor:
        if rotary_dim == HEAD_DIM:
            return torch_rotary(x, cos, sin, interleaved)
        rotated = torch_rotary(x[..., :rotary_dim], cos, sin, interleaved)
        return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)

    layout = "interleaved" if interleaved else "halves"
    shape = f"({batch}, {seqlen}, {HEADS}, {HEAD_DIM})"
    return Case(
        {"layout": layout, "rotary_dim": rotary_dim, "dtype": "bfloat16", "shape": shape},
        inputs,
        {"ours": ours, "torch": theirs, "torch.compile": torch.compile(theirs, dynamic=False)},
        forward_bytes=4 * ELEMENTS,
        backward_bytes=4 * ELEMENTS,
    )


def cases(quick: bool) -> list[Callable[[], Case]]:
    sizes = [(128, False)] if quick else [(128, False), (128, True), (64, False)]
    return [partial(make_case, rotary_dim, interleaved, 4096) for rotary_dim, interleaved in sizes]


if __name__ == "__main__":
    run("rotary", __doc__.splitlines()[0], cases)
