"""Attention forward and backward against SDPA's flash (FlashAttention-2) and cuDNN backends, in one interleaved run.

Every case holds 16k tokens and a hidden size of 2048 (heads = 2048 // head dim), as published sweeps do. FLOPs are
counted the usual way: 4 * B * H * Sq * Sk * D forward, half of it under a causal mask, and 2.5 times that backward.
fp16 runs at head dims 64 and 128 and three lengths, and so does the deterministic backward; --full runs all of it.
--direction runs the forward or the backward alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attention_summary import DETERMINISTIC, PEERS, summary
from contestants import (
    DIRECTIONS,
    OURS,
    Attend,
    Contestant,
    attention_flops,
    run,
    sdpa,
    time_directions,
    timed_rows,
)
from flash_attn_kernels import explain, flash_attn_func
from torch.nn.attention import SDPBackend

TOKENS, HIDDEN = 16384, 2048
BACKENDS = dict(zip(PEERS, (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), strict=True))
HEAD_DIMS, SEQLENS = (64, 96, 128, 192, 256), (512, 1024, 2048, 4096, 8192, 16384)
SUBSET_HEAD_DIMS, SUBSET_SEQLENS = (64, 128), (1024, 4096, 16384)


def our_attention(causal: bool, deterministic: bool = False) -> Attend:
    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal, deterministic=deterministic, strict=True)


def bench_case(
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    seqlen: int,
    directions: Sequence[str],
    samples: int,
    deterministic: bool,
) -> list[dict[str, Any]]:
    batch, heads = TOKENS // seqlen, HIDDEN // head_dim
    q, k, v, dout = torch.randn(4, batch, seqlen, heads, head_dim, device="cuda", dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    path = explain(*leaves, causal=causal).path
    contestants = {OURS: Contestant(our_attention(causal), leaves, [dout], path)}
    if deterministic:
        ours = our_attention(causal, deterministic=True)
        path = explain(*leaves, causal=causal, deterministic=True).path
        contestants[DETERMINISTIC] = Contestant(ours, leaves, [dout], path, forward=False)
    for name, backend in BACKENDS.items():
        contestants[name] = Contestant(sdpa(backend, is_causal=causal), leaves, [dout])
    flops = attention_flops(batch, heads, seqlen, head_dim, causal)
    rows = []
    for direction, times in time_directions(contestants, directions, samples=samples).items():
        case = {
            "kind": "cell",
            "scope": None,  # of a summary
            "statistic": "median",
            "direction": direction,
            "dtype": str(dtype).removeprefix("torch."),
            "head_dim": head_dim,
            "causal": causal,
            "seqlen": seqlen,
        }
        rows += timed_rows(times, contestants, case, flops * DIRECTIONS[direction])
    return rows


def cases(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    grid = itertools.product((torch.bfloat16, torch.float16), HEAD_DIMS, (False, True), SEQLENS)
    cells: list[dict[str, Any]] = []
    for dtype, head_dim, causal, seqlen in grid:
        in_subset = head_dim in SUBSET_HEAD_DIMS and seqlen in SUBSET_SEQLENS
        if arguments.quick and not (in_subset and seqlen == 4096):
            continue
        if dtype == torch.float16 and not (in_subset or arguments.full):
            continue
        deterministic = arguments.full or (in_subset and dtype == torch.bfloat16)
        samples = 5 if arguments.quick else 7
        rows = bench_case(dtype, head_dim, causal, seqlen, arguments.directions, samples, deterministic)
        cells += rows
        yield rows
    yield summary(cells)


if __name__ == "__main__":
    run(
        "attention",
        __doc__.splitlines()[0],
        cases,
        by_direction=True,
        full_help="fp16 and deterministic on the whole grid",
    )
