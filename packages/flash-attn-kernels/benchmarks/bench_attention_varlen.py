"""Packed sequences of ragged lengths against dense calls on groups of equal length, and against FlashAttention-2.

54 sequences of 128 tokens and 6 of 4096, in random order: nine tenths are short, most work is in the long ones. "dense"
is one call on all short and one on all long sequences, the least that they could cost without packing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contestants import (
    BACKWARD_FACTOR,
    OURS,
    Contestant,
    attention_flops,
    flash2_varlen,
    run,
    time_both_directions,
    timed_rows,
)
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func
from torch import Tensor

SHORT, LONG = 128, 4096
COUNT_OF_LENGTH = {SHORT: 54, LONG: 6}
HEADS = ((32, 32), (32, 8))  # of queries, of keys and values


def ragged_lengths() -> Tensor:
    """int64 (60,) in random order."""
    lengths = torch.tensor([length for length, count in COUNT_OF_LENGTH.items() for _ in range(count)])
    return lengths[torch.randperm(len(lengths))]


def rows_by_length(lengths: Tensor) -> Tensor:
    """The row numbers of all short sequences, then those of all long ones."""
    of_token = lengths.repeat_interleave(lengths)
    return torch.cat([(of_token == length).nonzero().flatten() for length in COUNT_OF_LENGTH])


def split_by_length(x: Tensor, rows: Tensor) -> list[Tensor]:
    """(T, H, D) as one dense (sequences, length, H, D) tensor for each length."""
    parts = x[rows].split([count * length for length, count in COUNT_OF_LENGTH.items()])
    return [part.unflatten(0, (-1, length)) for part, length in zip(parts, COUNT_OF_LENGTH, strict=True)]


def bench_case(head_dim: int, heads: tuple[int, int], causal: bool, samples: int) -> list[dict[str, Any]]:
    lengths = ragged_lengths()
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to("cuda", torch.int32)
    rows = rows_by_length(lengths).cuda()
    order = torch.argsort(rows)
    q, k, v, dout = (
        torch.randn(len(rows), h, head_dim, device="cuda", dtype=torch.bfloat16)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    packed = [x.detach().requires_grad_() for x in (q, k, v)]
    dense = [
        x.detach().requires_grad_()
        for group in zip(*(split_by_length(x, rows) for x in (q, k, v)), strict=True)
        for x in group
    ]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, LONG, LONG, causal=causal, strict=True)

    def dense_calls(*qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(flash_attn_func(*group, causal=causal, strict=True) for group in (qkv[:3], qkv[3:]))

    def packed_again(tensors: Sequence[Tensor]) -> list[Tensor]:
        """Results of the dense calls, all of the first one before all of the second, in the order of ours."""
        half = len(tensors) // 2
        pairs = zip(tensors[:half], tensors[half:], strict=True)
        return [torch.cat([x.flatten(0, 1) for x in pair])[order] for pair in pairs]

    path = explain(q, k, v, causal=causal, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens).path
    contestants = {
        OURS: Contestant(ours, packed, [dout], path),
        "dense": Contestant(dense_calls, dense, split_by_length(dout, rows), path, comparable=packed_again),
        "flash2": Contestant(flash2_varlen(cu_seqlens, LONG, causal), packed, [dout]),
    }
    times = time_both_directions(contestants, samples=samples)
    flops = sum(
        attention_flops(count, heads[0], length, head_dim, causal)
        for length, count in COUNT_OF_LENGTH.items()
    )
    result = []
    for direction, factor in (("forward", 1.0), ("backward", BACKWARD_FACTOR)):
        case = {
            "direction": direction,
            "head_dim": head_dim,
            "heads": "{}/{}".format(*heads),
            "causal": causal,
        }
        result += timed_rows(times[direction], contestants, case, flops * factor)
    return result


def cases(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    samples = 6 if arguments.quick else 15
    for head_dim, heads, causal in itertools.product((64, 128), HEADS, (False, True)):
        if not arguments.quick or causal:
            yield bench_case(head_dim, heads, causal, samples)


if __name__ == "__main__":
    run("attention_varlen", __doc__.splitlines()[0], cases)
