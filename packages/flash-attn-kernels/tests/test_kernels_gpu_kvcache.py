"""The CUDA kernels of inference attention: histories of a cache, graphs with other lengths, the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_attn_kernels import append_kv, flash_attn_func, flash_attn_with_kvcache
from flash_attn_kernels.testing import captured
from flash_attn_kernels.testing.cache_case import CacheCase, check_cache_history, run_cache_history

pytestmark = pytest.mark.gpu

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "contiguous, dense": {"dense": True, "lengths": (150, 150)},
    "rows, dense": {"batch_idx": True, "dense": True},
    "pages of 1": {"page_size": 1},
    "pages of 3": {"page_size": 3, "shared_pages": 2},
    "pages of 16": {"page_size": 16, "shared_pages": 1, "lengths": (300, 19, 131, 64)},
    "pages of 256": {"page_size": 256},
    "pages and rows": {"page_size": 4, "batch_idx": True, "shared_pages": 1},
    "padded rows": {"leftpad": True, "batch_idx": True, "dense": True},
    "padded pages and rows": {"leftpad": True, "page_size": 4, "batch_idx": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 45},
    "softcap and sink": {"softcap": 1.5, "sink": True},
    "alibi of each": {"alibi": "bh"},
    "rotary": {"rotary_dim": 32},
    "rotary halves": {"rotary_dim": 10, "interleaved": False},
    "splits": {"num_splits": 3},
    "invariant": {"batch_invariant": True},
    "everything": {
        "window_left": 70, "softcap": 2.0, "alibi": "bh", "sink": True, "rotary_dim": 12, "num_splits": 2,
    },
}  # fmt: skip
SHAPES = [
    ((8, 2), (64, 64)),
    ((6, 1), (128, 128)),
    ((4, 4), (40, 72)),
    ((14, 2), (256, 256)),
    ((40, 2), (96, 64)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_equal_the_whole(layout: str, options: str) -> None:
    number = list(LAYOUTS).index(layout) + list(OPTIONS).index(options)
    heads, head_dims = SHAPES[number % len(SHAPES)]
    case = {
        "dtype": [torch.bfloat16, torch.float16][number % 2], "heads": heads, "head_dims": head_dims,
        "lengths": (300, 9, 131, 64), "most_new": 80, **LAYOUTS[layout], **OPTIONS[options],
    }  # fmt: skip
    check_cache_history(CacheCase(**case), "cuda", strict=True)


def test_chunks_of_the_prefill_give_the_same_bits() -> None:
    common: dict[str, Any] = {
        "dtype": torch.bfloat16, "lengths": (700, 20, 337), "heads": (6, 2), "head_dims": (64, 64),
        "batch_invariant": True, "sink": True, "window_left": 400,
    }  # fmt: skip
    whole = run_cache_history(CacheCase(**common, most_new=10**6), "cuda", strict=True)[:2]
    for other in ({"most_new": 23, "page_size": 8}, {"most_new": 200, "batch_idx": True, "dense": True}):
        found = run_cache_history(CacheCase(**common, **other), "cuda", strict=True)[:2]
        for a, b in zip(itertools.chain(*found), itertools.chain(*whole), strict=True):
            assert torch.equal(a, b)


def _cache(B: int, S: int, Hk: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(B, S, Hk, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_a_graph_replays_with_other_lengths(num_splits: int) -> None:
    B, S, H, Hk, D = 7, 900, 8, 2, 64
    k_cache, v_cache = _cache(B, S, Hk, D)
    q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(2, B, 1, Hk, D, device="cuda", dtype=torch.bfloat16)
    lengths = torch.zeros(B, dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, *new, cache_seqlens=lengths, causal=True, num_splits=num_splits, strict=True
        )

    graph, out = captured(step)
    for _ in range(100):
        lengths.copy_(torch.randint(0, S, (B,)))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())
    for b in range(B):
        n = int(lengths[b]) + 1
        expected = flash_attn_func(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], causal=True)
        torch.testing.assert_close(replayed[b : b + 1], expected, atol=2e-2, rtol=2e-2)


def test_no_call_waits_for_the_device() -> None:
    k_cache, v_cache = _cache(3, 100, 2, 64)
    q, k, v = (torch.randn(3, 2, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    lengths = torch.tensor([0, 50, 98], dtype=torch.int32, device="cuda")
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, strict=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for splits in (0, 1, 4):
            flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, num_splits=splits, strict=True
            )
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7, batch_invariant=True, strict=True)
        append_kv(k_cache, v_cache, k, v, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_without_room_are_dropped() -> None:
    """An append past the end of the cache changes nothing else."""
    k_cache, v_cache = _cache(2, 16, 2, 64)
    before = k_cache.clone(), v_cache.clone()
    k, v = (torch.randn(2, 4, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    append_kv(k_cache, v_cache, k, v, torch.tensor([14, 20], dtype=torch.int32, device="cuda"))
    for cache, old, added in ((k_cache, before[0], k), (v_cache, before[1], v)):
        assert torch.equal(cache[0, :14], old[0, :14]) and torch.equal(cache[0, 14:], added[0, :2])
        assert torch.equal(cache[1], old[1])


@pytest.mark.parametrize("page_size", [None, 16])
def test_long_caches(page_size: int | None) -> None:
    """Many parts of few sequences, and sequences that differ a lot."""
    check_cache_history(
        CacheCase(
            dtype=torch.bfloat16, heads=(8, 2), head_dims=(128, 128), lengths=(9000, 1, 3000), page_size=page_size,
            most_new=10**6,
        ),
        "cuda",
        strict=True,
    )  # fmt: skip


def kernels_of(call: Callable[[], Any]) -> set[str]:
    """The namespaces of the attention kernels that a call starts."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "flash_attn::" in event.name]
    assert names, "the profiler saw no attention kernel"
    return {path for path in ("decode", "sm80", "sm90") for name in names if f"::{path}::" in name}


LONG: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "entries": {"cache_batch_idx": [2, 0, 3]},
    "pages": {"page_size": 16},
    "pages of 5 and entries": {"page_size": 5, "cache_batch_idx": [1, 3, 0]},
    "packed": {"cu_seqlens_q": [0, 170, 171, 400]},
    "packed, pages": {"cu_seqlens_q": [0, 170, 171, 400], "page_size": 64},
    "alibi": {"alibi_slopes": True},
    "window, softcap and sink": {"window_size": (100, 3), "softcap": 2.0, "learnable_sink": True},
}


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_long_queries_take_the_kernels_for_training(name: str, appends: bool) -> None:
    """What they compute is what the decode kernel computes: the same keys, masks and pages, also bad ones."""
    options = {"causal": True, **LONG[name]}
    B, entries, S, H, Hk, D = 3, 4, 640, 16, 2, 64
    page_size, cu_seqlens = options.pop("page_size", None), options.pop("cu_seqlens_q", None)
    k_cache, v_cache = _cache(entries, S, Hk, D)
    if page_size is not None:
        pages = S // page_size
        table = torch.randperm(entries * pages, device="cuda").to(torch.int32).view(entries, pages)
        table[0, 3], table[1, 2], table[3, 7] = -1, 10**6, entries * pages  # pages that do not exist
        k_cache, v_cache = (x.view(-1, page_size, Hk, D) for x in (k_cache, v_cache))
        options["block_table"] = table
    if "cache_batch_idx" in options:
        options["cache_batch_idx"] = torch.tensor(
            options["cache_batch_idx"], dtype=torch.int32, device="cuda"
        )
    elif page_size is not None:
        options["block_table"] = options["block_table"][:B]
    else:
        k_cache, v_cache = k_cache[:B], v_cache[:B]
    if cu_seqlens is not None:
        options["cu_seqlens_q"] = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    for modifier in ("alibi_slopes", "learnable_sink"):
        if modifier in options:
            options[modifier] = torch.rand(H, device="cuda")
    tokens = (B, 130) if cu_seqlens is None else (cu_seqlens[-1] + 7,)
    q, k, v = (torch.randn(*tokens, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, Hk, Hk))
    lengths = [300, 20, 500] if not appends else [170, 20, 300]
    options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    if appends:
        options |= {"k": k, "v": v}
        options |= dict(
            zip(("rotary_cos", "rotary_sin"), torch.randn(2, S, D // 4, device="cuda"), strict=True)
        )

    def call(num_splits: int) -> tuple[torch.Tensor, ...]:
        caches = k_cache.clone(), v_cache.clone()
        result = flash_attn_with_kvcache(
            q, *caches, num_splits=num_splits, return_softmax_lse=True, strict=True, **options
        )
        return *result, *caches

    by_sm90 = torch.cuda.get_device_capability()[0] == 9 and not (
        {"block_table", "cache_batch_idx", "alibi_slopes"} & set(options)
    )
    assert kernels_of(lambda: call(0)) - {"decode"} == {"sm90" if by_sm90 else "sm80"}
    assert kernels_of(lambda: call(1)) == {"decode"}
    out, lse, *caches = call(0)
    expected_out, expected_lse, *expected_caches = call(1)
    for found, expected in zip(caches, expected_caches, strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(out, expected_out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-4)
    assert torch.equal(call(0)[0], out)


def test_long_queries_ignore_what_no_key_was_written_to() -> None:
    """In rows that the copy engine can read."""
    k_cache, v_cache = _cache(2, 640, 2, 64)
    q = torch.randn(2, 130, 16, 64, device="cuda", dtype=k_cache.dtype)
    lengths = [300, 200]
    options: dict[str, Any] = {
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "causal": True,
        "strict": True,
    }
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    for entry, length in enumerate(lengths):
        k_cache[entry, length:], v_cache[entry, length:] = torch.nan, torch.nan
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, **options), expected)


def test_operators_compile() -> None:
    k_cache, v_cache = _cache(2, 64, 2, 64)
    q, k, v = (torch.randn(2, 1, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    lengths = torch.tensor([3, 40], dtype=torch.int32, device="cuda")

    def step(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, strict=True
        )

    expected = step(q, lengths)
    assert torch.equal(torch.compile(step, fullgraph=True)(q, lengths), expected)
