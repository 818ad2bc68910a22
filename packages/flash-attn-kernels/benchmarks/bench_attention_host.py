"""Host time of one attention call on tiny tensors, against SDPA's flash backend, whose kernels are FlashAttention-2.

B 1, S 16, H 4, D 64 in bf16: the device is done long before the host has issued the next call. A sample is many calls
without a wait; the device is waited for between samples only. Each contestant gets tensors in its own layout, and SDPA
has its backend chosen once for all calls.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from contestants import OURS, available, flash2_varlen, run
from flash_attn_kernels import (
    explain,
    explain_kvcache,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, SEQLEN, HEADS, HEAD_DIM = 1, 16, 4, 64
Calls = dict[str, Callable[[], object]]


def random_leaves(*shape: int, requires_grad: bool) -> list[Tensor]:
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(requires_grad)
        for _ in range(3)
    ]


def dense_calls(requires_grad: bool) -> tuple[Calls, str]:
    """The contestants' calls, and which of our paths ours takes."""
    ours = random_leaves(BATCH, SEQLEN, HEADS, HEAD_DIM, requires_grad=requires_grad)
    peer = random_leaves(BATCH, HEADS, SEQLEN, HEAD_DIM, requires_grad=requires_grad)
    calls: Calls = {
        OURS: lambda: flash_attn_func(*ours, causal=True, strict=True),
        "flash2": lambda: F.scaled_dot_product_attention(*peer, is_causal=True),
    }
    return calls, explain(*ours, causal=True).path


def varlen_calls(requires_grad: bool) -> tuple[Calls, str]:
    """As :func:`dense_calls`, for two packed sequences."""
    leaves = random_leaves(SEQLEN, HEADS, HEAD_DIM, requires_grad=requires_grad)
    cu_seqlens = torch.tensor([0, SEQLEN // 2, SEQLEN], dtype=torch.int32, device="cuda")
    flash2 = flash2_varlen(cu_seqlens, SEQLEN, causal=True)
    calls: Calls = {
        OURS: lambda: flash_attn_varlen_func(
            *leaves, cu_seqlens, cu_seqlens, SEQLEN, SEQLEN, causal=True, strict=True
        ),
        "flash2": lambda: flash2(*leaves),
    }
    return calls, explain(*leaves, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens).path


def cache_calls(appends: bool, rotates: bool) -> Callable[[bool], tuple[Calls, str]]:
    """As :func:`dense_calls`, for one query to a cache; SDPA has nothing to append with."""

    def make(requires_grad: bool) -> tuple[Calls, str]:
        shape = BATCH, SEQLEN, HEADS, HEAD_DIM
        k_cache, v_cache, *_ = random_leaves(*shape, requires_grad=requires_grad)
        q, k, v = random_leaves(BATCH, 1, HEADS, HEAD_DIM, requires_grad=requires_grad)
        lengths = torch.full((BATCH,), SEQLEN // 2, dtype=torch.int32, device="cuda")
        new: dict[str, Tensor] = {"k": k, "v": v} if appends else {}
        if rotates:
            new |= dict(
                zip(
                    ("rotary_cos", "rotary_sin"),
                    torch.randn(2, SEQLEN, HEAD_DIM // 2, device="cuda"),
                    strict=True,
                )
            )
        calls: Calls = {
            OURS: lambda: flash_attn_with_kvcache(
                q, k_cache, v_cache, cache_seqlens=lengths, causal=True, strict=True, **new
            )
        }
        if not appends:
            peer = [x.transpose(1, 2) for x in (q, k_cache, v_cache)]
            calls["flash2"] = lambda: F.scaled_dot_product_attention(*peer)
        return calls, explain_kvcache(k_cache, v_cache).path

    return make


def with_backward(calls: Calls) -> Calls:
    """Forward and backward, through ``out.backward`` as training does, with gradients added to the leaves'."""

    def both(call: Callable[[], Any]) -> Callable[[], object]:
        upstream = torch.randn_like(call())
        return lambda: call().backward(upstream)

    return {name: both(call) for name, call in calls.items()}


# Name -> what makes the calls, autograd on, backward too.
CASES: dict[str, tuple[Callable[[bool], tuple[Calls, str]], bool, bool]] = {
    "forward": (dense_calls, True, False),
    "forward-no-grad": (dense_calls, False, False),
    "forward-backward": (dense_calls, True, True),
    "varlen-forward": (varlen_calls, True, False),
    "varlen-forward-no-grad": (varlen_calls, False, False),
    "varlen-forward-backward": (varlen_calls, True, True),
    "cache": (cache_calls(appends=False, rotates=False), False, False),
    "cache-append": (cache_calls(appends=True, rotates=False), False, False),
    "cache-append-rotary": (cache_calls(appends=True, rotates=True), False, False),
}


def host_times_us(calls: Calls, batches: int, calls_per_batch: int) -> dict[str, list[float]]:
    """Sorted microseconds per call of every batch, the contestants in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for batch in range(batches + 1):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls_per_batch):
                call()
            elapsed = time.perf_counter() - begin
            if batch > 0:  # the first one warms up
                times[name].append(elapsed / calls_per_batch * 1e6)
    torch.cuda.synchronize()
    return {name: sorted(values) for name, values in times.items()}


def bench_case(case: str, batches: int, calls_per_batch: int) -> list[dict[str, Any]]:
    make_calls, requires_grad, backward = CASES[case]
    made, path = make_calls(requires_grad)
    calls = {
        name: call
        for name, call in made.items()
        if available(f"{name}, {case}", call, required=name == OURS) is not None
    }
    if backward:
        calls = with_backward(calls)
    gc.disable()
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            times = host_times_us(calls, batches, calls_per_batch)
    finally:
        gc.enable()
    return [
        {
            "call": case,
            "contestant": name,
            "path": path if name == OURS else None,
            "host_us": round(statistics.median(values), 2),
            "p20_us": round(values[round(0.2 * (len(values) - 1))], 2),
            "p80_us": round(values[round(0.8 * (len(values) - 1))], 2),
        }
        for name, values in times.items()
    ]


def cases(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    batches, calls_per_batch = (7, 200) if arguments.quick else (15, 300)
    for case in CASES:
        yield bench_case(case, batches, calls_per_batch)


if __name__ == "__main__":
    run("attention_host", __doc__.splitlines()[0], cases)
