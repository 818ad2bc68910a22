"""Bits that do not depend on the batch, the place in it or the chunks; and splits that do what their number says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_with_kvcache, kvcache_portable
from flash_attn_kernels.testing.cache_case import CacheCase, run_cache_history
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 21},
    "everything": {"window_left": 100, "softcap": 2.0, "alibi": "h", "sink": True, "rotary_dim": 8},
}


def bits(case: CacheCase) -> tuple[list[Tensor], list[Tensor]]:
    return run_cache_history(case)[:2]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    """Sums may also depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_of_the_prefill(dtype: torch.dtype, options: str) -> None:
    """One call, token by token, random chunks; contiguous and paged; sequences in any order and company."""
    common: dict[str, Any] = {
        "dtype": dtype, "lengths": (50, 20, 37), "heads": (6, 2), "head_dims": (24, 20), "batch_invariant": True,
        **OPTIONS[options],
    }  # fmt: skip
    whole = bits(CacheCase(**common, most_new=10**6))
    for other in (
        {"most_new": 1, "batch_idx": True, "dense": True},
        {"most_new": 23},
        {"most_new": 17, "page_size": 8, "batch_idx": True},
        {"most_new": 40, "page_size": 7, "batch_idx": True, "dense": True},
    ):
        # The same seed, so the same tensors.
        found = bits(CacheCase(**common, **other))
        for a, b in zip((*found[0], *found[1]), (*whole[0], *whole[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_batch_size_and_place(dtype: torch.dtype, causal: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B, S, H, Hk, D = 9, 600, 4, 2, 32
    q, k, v = (
        torch.randn(B, n, heads, D, generator=generator).to(dtype) for n, heads in ((3, H), (S, Hk), (S, Hk))
    )
    lengths = torch.randint(3, S, (B,), generator=generator, dtype=torch.int32)

    def attend(members: list[int]) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(
            q[members], k, v, cache_seqlens=lengths[members], causal=causal, batch_invariant=True,
            cache_batch_idx=torch.tensor(members, dtype=torch.int32), return_softmax_lse=True,
        )  # fmt: skip

    everyone = attend(list(range(B)))
    backwards = attend(list(range(B))[::-1])
    for b in range(B):
        alone = attend([b])
        for whole, reverse, one in zip(everyone, backwards, alone, strict=True):
            assert torch.equal(whole[b], one[0]) and torch.equal(reverse[B - 1 - b], one[0])


def test_the_mode_is_needed() -> None:
    """Without it some bits do change, or these tests would see nothing."""
    common: dict[str, Any] = {"lengths": (75, 40, 91), "heads": (6, 2), "head_dims": (24, 20)}
    whole, chunked = (bits(CacheCase(**common, most_new=n)) for n in (10**6, 33))
    assert any(not torch.equal(a, b) for a, b in zip(whole[0], chunked[0], strict=True))


def test_what_follows_a_query_changes_no_bit() -> None:
    """Not even the sign of zero: keys behind a row are in its block, with weight 0."""
    q, k = torch.zeros(1, 2, 1, 4), torch.ones(1, 20, 1, 4)
    v = torch.full((1, 20, 1, 4), -0.0)
    alone = flash_attn_with_kvcache(q, k, v, cache_seqlens=2, causal=True, batch_invariant=True)
    v[:, 2:] = -1.0
    first = flash_attn_with_kvcache(
        torch.zeros(1, 10, 1, 4), k, v, cache_seqlens=10, causal=True, batch_invariant=True
    )
    assert torch.equal(first[:, :2].view(torch.int32), alone.view(torch.int32))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 7, 256])
@pytest.mark.parametrize("paged", [False, True])
def test_exactly_so_many_parts(num_splits: int, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part covers its share of the keys, nothing twice, and the parts are combined."""
    counts: list[tuple[int, ...]] = []
    original = kvcache_portable.flash_attn_combine
    fill = kvcache_portable._fill

    def counted_fill(q: Tensor, out: Tensor, lse: Tensor, k: Tensor, *others: Any) -> None:
        counts[-1] = (*counts[-1], k.shape[1])
        fill(q, out, lse, k, *others)

    combined = []

    def counted_combine(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        combined.append(out.shape[0])
        return original(out, lse)

    monkeypatch.setattr(kvcache_portable, "_fill", counted_fill)
    monkeypatch.setattr(kvcache_portable, "flash_attn_combine", counted_combine)
    counts.append(())
    q, k = torch.randn(1, 1, 2, 8), torch.randn(5, 8, 1, 8)
    cache, places = k.reshape(1, 40, 1, 8), {}
    if paged:
        cache, places = k, {"block_table": torch.arange(5, dtype=torch.int32).unsqueeze(0)}
    out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=37, num_splits=num_splits, **places)
    parts = max(num_splits, 1)
    assert len(counts[0]) == parts and sum(counts[0]) == 37 and max(counts[0]) - min(counts[0]) <= 1
    assert combined == ([parts] if parts > 1 else [])
    plain = flash_attn_with_kvcache(q, k.reshape(1, 40, 1, 8), k.reshape(1, 40, 1, 8), cache_seqlens=37)
    torch.testing.assert_close(out, plain)
