"""Attention on a key-value cache: whatever the chunks, the pages and the padding, it equals attention on the whole."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_with_kvcache, kvcache_portable
from flash_attn_kernels.inputs import ScoreModifiers
from flash_attn_kernels.options import make_options
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_kernels.testing.cache_case import CacheCase, check_cache_history
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INF = float("inf")

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "contiguous, dense": {"dense": True, "lengths": (14, 14)},
    "rows": {"batch_idx": True},
    "rows, dense": {"batch_idx": True, "dense": True},
    "pages of 1": {"page_size": 1},
    "pages of 3": {"page_size": 3, "shared_pages": 2},
    "pages of 16": {"page_size": 16},
    "pages of 256": {"page_size": 256},
    "pages and rows": {"page_size": 4, "batch_idx": True, "shared_pages": 1},
    "pages and rows, dense": {"page_size": 5, "batch_idx": True, "dense": True},
    "padded": {"leftpad": True},
    "padded rows": {"leftpad": True, "batch_idx": True, "dense": True},
    "padded pages and rows": {"leftpad": True, "page_size": 4, "batch_idx": True},
    "padded shared pages": {"leftpad": True, "page_size": 2, "shared_pages": 3},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 5},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "h"},
    "alibi of each": {"alibi": "bh"},
    "sink": {"sink": True},
    "rotary": {"rotary_dim": 16},
    "rotary halves": {"rotary_dim": 10, "interleaved": False},
    "rotary two": {"rotary_dim": 2},
    "splits": {"num_splits": 3},
    "many splits": {"num_splits": 40, "sink": True},
    "invariant": {"batch_invariant": True},
    "heads": {"heads": (6, 1), "head_dims": (8, 12)},
    "odd heads": {"heads": (15, 3), "head_dims": (10, 7), "rotary_dim": 6},
    "everything": {
        "window_left": 7, "softcap": 2.0, "alibi": "bh", "sink": True, "rotary_dim": 12, "num_splits": 2,
    },
    "everything, invariant": {
        "window_left": 7, "softcap": 2.0, "alibi": "bh", "sink": True, "rotary_dim": 12, "batch_invariant": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_equal_the_whole(layout: str, options: str) -> None:
    check_cache_history(CacheCase(**LAYOUTS[layout], **OPTIONS[options], seed=len(layout)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "padded pages and rows"])
@pytest.mark.parametrize("options", ["plain", "everything", "everything, invariant"])
def test_dtypes(dtype: torch.dtype, layout: str, options: str) -> None:
    check_cache_history(CacheCase(dtype=dtype, **LAYOUTS[layout], **OPTIONS[options]))


@pytest.mark.parametrize("seed", range(30))
def test_random_histories(seed: int) -> None:
    layouts, options = list(LAYOUTS.values()), list(OPTIONS.values())
    lengths = [(40, 3, 25, 17), (9,), (30, 30)][seed % 3]
    layout = {"lengths": lengths, **layouts[seed % len(layouts)]}
    if layout.get("shared_pages"):
        layout["lengths"] = (23, 9, 16)
    if layout.get("dense") and not layout.get("batch_idx"):
        layout["lengths"] = (14, 14)
    check_cache_history(CacheCase(**layout, **options[seed * 7 % len(options)], most_new=1 + seed, seed=seed))


def test_long_sequences() -> None:
    """More keys than one block of any loop has."""
    check_cache_history(CacheCase(lengths=(1100, 30), page_size=16, most_new=700, alibi="h", leftpad=True))
    check_cache_history(CacheCase(lengths=(1100,), batch_invariant=True, window_left=600, most_new=700))


# Single calls, on what is in the cache already


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WINDOWS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (3, 2)},
    {"window_size": (-1, 4)},
    {"window_size": (6, -1)},
    {"window_size": (4, 7), "causal": True},
    {"window_size": (10**9, 10**9)},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("mode", [{}, {"num_splits": 4}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_windows_on_both_sides(window: dict[str, Any], mode: dict[str, Any], dtype: torch.dtype) -> None:
    """Also with more queries than keys, no keys, and nothing but padding: rows that see nothing are 0 and -inf."""
    lengths, leftpads, Sq = (30, 7, 0, 9), (5, 2, 0, 9), 12
    q, k, v = (
        randn(4, Sq, 6, 8, dtype=dtype),
        randn(4, 32, 3, 8, seed=1, dtype=dtype),
        randn(4, 32, 3, 5, seed=2, dtype=dtype),
    )
    slopes, sink = randn(4, 6, seed=3).abs(), randn(6, seed=4)
    for b, (length, leftpad) in enumerate(zip(lengths, leftpads, strict=True)):
        for x in (k, v):
            x[b, :leftpad] = x[b, length:] = torch.nan
    for modifiers in ({}, {"alibi_slopes": slopes, "softcap": 1.0}, {"learnable_sink": sink}):
        out, lse = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=int32(*lengths), cache_leftpad=int32(*leftpads), return_softmax_lse=True,
            **window, **mode, **modifiers,
        )  # fmt: skip
        assert out.dtype == dtype and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
        options = make_options(
            head_dim=8, softmax_scale=None, causal=window.get("causal", False), dropout_p=0.0, deterministic=False,
            window_size=window.get("window_size", (-1, -1)), softcap=modifiers.get("softcap", 0.0),
        )  # fmt: skip
        for b, (length, leftpad) in enumerate(zip(lengths, leftpads, strict=True)):
            exact, plain = (
                attention_reference(
                    *(x[b : b + 1, part] for x, part in ((q, slice(None)), (k, slice(length)), (v, slice(length)))),
                    options,
                    modifiers=ScoreModifiers(
                        alibi_slopes=slopes[b : b + 1] if "alibi_slopes" in modifiers else None,
                        learnable_sink=modifiers.get("learnable_sink"),
                        key_padding_mask=(torch.arange(length) >= leftpad).unsqueeze(0),
                    ),
                    compute_dtype=compute_dtype,
                )
                for compute_dtype in (torch.float64, dtype)
            )  # fmt: skip
            assert_within_reference_error(out[b], exact.out[0], plain.out[0], name=f"out {b}")
            assert_within_reference_error(lse[b], exact.lse[0], plain.lse[0], name=f"lse {b}")
        if not modifiers:
            assert (out[2:] == 0).all() and (lse[2:] == -INF).all()


ACTS: dict[str, dict[str, Any]] = {
    "cache_seqlens": {"cache_seqlens": int32(9, 3)},
    "one length": {"cache_seqlens": 8},
    "cache_batch_idx": {"cache_batch_idx": int32(1, 0)},
    "cache_leftpad": {"cache_leftpad": int32(0, 2)},
    "softmax_scale": {"softmax_scale": 0.1},
    "causal": {"causal": True},
    "left": {"window_size": (3, -1)},
    "right": {"window_size": (-1, 0)},
    "softcap": {"softcap": 1.0},
    "alibi_slopes": {"alibi_slopes": torch.full((4,), 0.5)},
    "learnable_sink": {"learnable_sink": torch.zeros(4)},
    "num_splits": {"num_splits": 3},
    "rotary": {"rotary_cos": randn(40, 3).float(), "rotary_sin": randn(40, 3).float()},
}


@pytest.mark.parametrize("name", ACTS)
def test_every_option_acts(name: str) -> None:
    def results(**changes: Any) -> Tensor:
        k_cache, v_cache = randn(2, 40, 2, 8, seed=1).float(), randn(2, 40, 2, 8, seed=2).float()
        k, v = randn(2, 5, 2, 8, seed=3).float(), randn(2, 5, 2, 8, seed=4).float()
        arguments = {"cache_seqlens": int32(31, 30), **changes}
        return flash_attn_with_kvcache(randn(2, 5, 4, 8).float(), k_cache, v_cache, k, v, **arguments)

    assert not torch.equal(results(), results(**ACTS[name]))
    if name == "rotary":
        assert not torch.equal(results(**ACTS[name]), results(**ACTS[name], rotary_interleaved=False))


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_a_number_in_a_tensor_may_change_between_calls(name: str) -> None:
    """As a learned temperature does: a kept plan is not taken for the same number."""
    q, k, v = randn(2, 3, 4, 8), randn(2, 9, 2, 8, seed=1), randn(2, 9, 2, 8, seed=2)
    number = torch.tensor(0.25)
    for value in (0.25, 2.0):
        number.fill_(value)
        expected = flash_attn_with_kvcache(q, k, v, **{name: value})
        assert torch.equal(flash_attn_with_kvcache(q, k, v, **{name: number}), expected)


def test_without_lengths_the_whole_cache_is_there() -> None:
    q, k, v = randn(2, 3, 4, 8), randn(2, 9, 2, 8, seed=1), randn(2, 9, 2, 8, seed=2)
    expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=9)
    assert torch.equal(flash_attn_with_kvcache(q, k, v), expected)
    pages = {"block_table": int32([0, 1, 2], [3, 4, 5])}
    k, v = (x.reshape(6, 3, 2, 8) for x in (k, v))
    torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, **pages), expected)


def test_new_keys_of_another_number_than_queries() -> None:
    """Packed queries with dense new keys, dense queries with packed ones, and lengths of their own."""
    caches = randn(2, 20, 2, 8, seed=1), randn(2, 20, 2, 8, seed=2)
    q, k, v = randn(2, 2, 4, 8), randn(2, 5, 2, 8, seed=3), randn(2, 5, 2, 8, seed=4)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    cu_q, cu_k = int32(0, 2, 4), int32(0, 5, 10)

    def results(q: Tensor, k: Tensor, v: Tensor, **lengths: Tensor) -> list[Tensor]:
        mine = [x.clone() for x in caches]
        out = flash_attn_with_kvcache(
            q, *mine, k, v, cache_seqlens=int32(3, 8), causal=True, validate=True, **lengths
        )
        return [out.reshape(2, 2, 4, 8), *mine]

    expected = results(q, k, v)
    for other in (
        results(packed[0], k, v, cu_seqlens_q=cu_q),
        results(q, *packed[1:], cu_seqlens_k_new=cu_k),
        results(*packed, cu_seqlens_q=cu_q, cu_seqlens_k_new=cu_k),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_nothing_at_all() -> None:
    """No sequences, no queries, no new keys."""
    cache = torch.zeros(0, 4, 2, 8)
    assert flash_attn_with_kvcache(torch.zeros(0, 3, 4, 8), cache, cache, cache_seqlens=0).shape == (
        0,
        3,
        4,
        8,
    )
    packed = flash_attn_with_kvcache(torch.zeros(5, 4, 8), cache, cache, cu_seqlens_q=int32(0))
    assert packed.shape == (5, 4, 8) and (packed == 0).all()
    cache = randn(2, 4, 2, 8)
    before = cache.clone()
    none = torch.zeros(2, 0, 2, 8, dtype=torch.float64)
    out, lse = flash_attn_with_kvcache(
        torch.zeros(2, 0, 4, 8, dtype=torch.float64),
        cache,
        cache,
        none,
        none,
        cache_seqlens=4,
        return_softmax_lse=True,
    )
    assert out.shape == (2, 0, 4, 8) and lse.shape == (2, 4, 0) and torch.equal(cache, before)


def test_the_signature_is_flash_attentions() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
        "cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved",
        "alibi_slopes", "num_splits", "return_softmax_lse",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", [(0, False), (2, False), (0, True)])
def test_memory_is_linear(mode: tuple[int, bool]) -> None:
    """No tensor is larger than the queries, or than the scores of one block."""
    largest = 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    S = 4096
    q, cache = torch.ones(1, S, 1, 64), torch.ones(S // 16, 16, 1, 64)
    table = torch.arange(S // 16, dtype=torch.int32).unsqueeze(0)
    with LargestTensor():
        kvcache_portable.decode(q, cache, cache, int32(S), 0.1, -1, 0, 0.0, *mode, block_table=table)
    copies = max(mode[0], 1) + 0.1  # partial results of each split; a block of queries more
    assert largest <= copies * q.numel() * q.element_size()
