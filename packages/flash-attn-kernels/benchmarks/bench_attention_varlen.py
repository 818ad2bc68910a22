"""Packed sequences against dense calls on the same tokens, and against FlashAttention-2's packed call.

kind "ragged": 54 sequences of 128 tokens and 6 of 4096, in random order: nine tenths are short, most work is in the
long ones. "dense" is one call on all short and one on all long sequences, the least that they could cost without
packing. kind "equal": 16k tokens in sequences of one length, at a hidden size of 2048. "dense" is one call on the same
values.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contestants import (
    DIRECTIONS,
    OURS,
    Attend,
    Contestant,
    attention_flops,
    flash2_varlen,
    run,
    time_directions,
    timed_rows,
)
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func
from torch import Tensor

HIDDEN = 2048
HEAD_DIMS = (64, 128)
RAGGED = {128: 54, 4096: 6}  # length -> sequences
RAGGED_HEADS = ((32, 32), (32, 8))  # of queries, of keys and values
EQUAL = ({1024: 16}, {4096: 4}, {16384: 1})
Rows = list[dict[str, Any]]


def random_lengths(count_of_length: Mapping[int, int]) -> Tensor:
    """int64 (sequences,) in random order."""
    lengths = torch.tensor([length for length, count in count_of_length.items() for _ in range(count)])
    return lengths[torch.randperm(len(lengths))]


def rows_by_length(lengths: Tensor, count_of_length: Mapping[int, int]) -> Tensor:
    """The row numbers of all sequences of the first length, then of the next one, and so on."""
    of_token = lengths.repeat_interleave(lengths)
    return torch.cat([(of_token == length).nonzero().flatten() for length in count_of_length])


def split_by_length(x: Tensor, rows: Tensor, count_of_length: Mapping[int, int]) -> list[Tensor]:
    """(T, H, D) as one dense (sequences, length, H, D) tensor for each length."""
    parts = x[rows].split([count * length for length, count in count_of_length.items()])
    return [part.unflatten(0, (-1, length)) for part, length in zip(parts, count_of_length, strict=True)]


def merge_lengths(tensors: Sequence[Tensor], group_count: int, order: Tensor) -> list[Tensor]:
    """Results of one dense call after the other, one for each length, as packed tensors: undoes the split."""
    of_each_call = len(tensors) // group_count
    kinds = [tensors[i::of_each_call] for i in range(of_each_call)]
    return [torch.cat([x.flatten(0, 1) for x in parts])[order] for parts in kinds]


def packed_attention(cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Attend:
    return lambda q, k, v: flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=causal, strict=True
    )


def dense_attention(qkv: Sequence[Tensor], causal: bool) -> tuple[Tensor, ...]:
    """One call for each q, k, v in turn."""
    calls = zip(qkv[::3], qkv[1::3], qkv[2::3], strict=True)
    return tuple(flash_attn_func(q, k, v, causal=causal, strict=True) for q, k, v in calls)


def bench_case(
    kind: str,
    count_of_length: Mapping[int, int],
    head_dim: int,
    heads: tuple[int, int],
    causal: bool,
    directions: Sequence[str],
    samples: int,
) -> Rows:
    lengths = random_lengths(count_of_length)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to("cuda", torch.int32)
    rows = rows_by_length(lengths, count_of_length).cuda()
    order = torch.argsort(rows)
    q, k, v, dout = (
        torch.randn(len(rows), h, head_dim, device="cuda", dtype=torch.bfloat16)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    packed = [x.detach().requires_grad_() for x in (q, k, v)]
    groups = zip(*(split_by_length(x, rows, count_of_length) for x in (q, k, v)), strict=True)
    dense = [x.detach().requires_grad_() for group in groups for x in group]
    max_seqlen = max(count_of_length)
    contestants = {
        OURS: Contestant(
            packed_attention(cu_seqlens, max_seqlen, causal),
            packed,
            [dout],
            explain(*packed, causal=causal, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens).path,
        ),
        "dense": Contestant(
            lambda *qkv: dense_attention(qkv, causal),
            dense,
            split_by_length(dout, rows, count_of_length),
            explain(*dense[:3], causal=causal).path,
            comparable=lambda tensors: merge_lengths(tensors, len(count_of_length), order),
        ),
        "flash2": Contestant(flash2_varlen(cu_seqlens, max_seqlen, causal), packed, [dout]),
    }
    flops = sum(
        attention_flops(count, heads[0], length, head_dim, causal)
        for length, count in count_of_length.items()
    )
    result = []
    for direction, times in time_directions(contestants, directions, samples=samples).items():
        case = {
            "kind": kind,
            "lengths": ", ".join(f"{count} x {length}" for length, count in count_of_length.items()),
            "direction": direction,
            "head_dim": head_dim,
            "heads": "{}/{}".format(*heads),
            "causal": causal,
        }
        result += timed_rows(times, contestants, case, flops * DIRECTIONS[direction])
    return result


def cases(arguments: argparse.Namespace) -> Iterator[Rows]:
    masks = (True,) if arguments.quick else (False, True)
    measured: dict[str, Any] = {"directions": arguments.directions, "samples": 6 if arguments.quick else 15}
    for head_dim, heads, causal in itertools.product(HEAD_DIMS, RAGGED_HEADS, masks):
        yield bench_case("ragged", RAGGED, head_dim, heads, causal, **measured)
    for head_dim, causal, lengths in itertools.product(HEAD_DIMS, masks, EQUAL):
        heads = (HIDDEN // head_dim, HIDDEN // head_dim)
        yield bench_case("equal", lengths, head_dim, heads, causal, **measured)


if __name__ == "__main__":
    run("attention_varlen", __doc__.splitlines()[0], cases, by_direction=True)
