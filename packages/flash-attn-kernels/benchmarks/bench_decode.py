"""Attention of one new query to a cache of keys, against SDPA's flash (FlashAttention-2) and cuDNN backends.

bf16, head dim 128. What counts is the rate at which keys and values are read, as a share of a device copy in the same
run. "best splits" is the fastest of our calls with a fixed number of parts, which the chosen one is compared with;
"page 16" is ours with pages of 16 keys in random order; "graph" is ours replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contestants import OURS, available, check_agreement, run, sdpa
from flash_attn_kernels import flash_attn_with_kvcache
from flash_attn_kernels.testing import captured, interleaved_times
from torch import Tensor
from torch.nn.attention import SDPBackend

HEAD_DIM, PAGE_SIZE = 128, 16
# Sequences, keys of each, query heads, key-value heads.
CASES = ((1, 8192, 32, 8), (1, 131072, 32, 8), (16, 8192, 32, 8), (64, 4096, 32, 8), (128, 2048, 32, 32))
SPLITS = (1, 2, 4, 8, 16, 32)
PEERS = {"flash2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call from a CUDA graph; returns the graph's own output."""
    graph, out = captured(call)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def bench_case(
    batch: int, seqlen: int, heads: int, kv_heads: int, samples: int, fixed: tuple[int, ...]
) -> list[dict[str, Any]]:
    q = torch.randn(batch, 1, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, seqlen, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device="cuda")
    pages = batch * seqlen // PAGE_SIZE
    table = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)
    k_pages, v_pages = (torch.empty_like(x).view(pages, PAGE_SIZE, kv_heads, HEAD_DIM) for x in (k, v))
    k_pages[table.flatten().long()], v_pages[table.flatten().long()] = (
        x.view(pages, PAGE_SIZE, kv_heads, HEAD_DIM) for x in (k, v)
    )

    def ours(num_splits: int = 0) -> Callable[[], Tensor]:
        return lambda: flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, causal=True, num_splits=num_splits, strict=True
        )

    calls: dict[str, Callable[[], Tensor]] = {
        OURS: ours(),
        "page 16": lambda: flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=True, strict=True
        ),
        "graph": replayed(ours()),
        **{f"splits {splits}": ours(splits) for splits in fixed},
    }
    for name, backend in PEERS.items():
        peer = sdpa(backend)
        if available(name, lambda peer=peer: peer(q, k, v)) is not None:
            calls[name] = lambda peer=peer: peer(q, k, v)
    check_agreement({name: (call(),) for name, call in calls.items()})
    times = interleaved_times(calls, samples=samples, warmup=2, min_sample_us=200.0)
    cache_bytes = k.nbytes + v.nbytes
    best = min(time.median_us for name, time in times.items() if name.startswith("splits"))
    shown = [name for name in times if not name.startswith("splits")]
    timed = {**{name: times[name].median_us for name in shown}, "best splits": best}
    return [
        {
            "batch": batch,
            "length": seqlen,
            "heads": f"{heads}/{kv_heads}",
            "contestant": name,
            "median_us": round(median_us, 2),
            "gbps": round(cache_bytes / median_us * 1e-3, 1),
            "speedup_of_ours": round(median_us / timed[OURS], 3),
        }
        for name, median_us in timed.items()
    ]


def cases(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    samples = 5 if arguments.quick else 15
    for batch, seqlen, heads, kv_heads in CASES:
        fixed = SPLITS if batch * kv_heads < 2048 else SPLITS[:2]
        yield bench_case(batch, seqlen, heads, kv_heads, samples, fixed)


if __name__ == "__main__":
    run("decode", __doc__.splitlines()[0], cases)
