"""Appending to a cache: what is written and rotated, as an operator that torch.compile and torch.export understand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flash_attn_kernels import (
    append_kv,
    explain_kvcache,
    flash_attn_with_kvcache,
    kvcache_operators,
    library,
)
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_kernels.testing.cache_case import rotary_by_complex_numbers
from torch import Tensor

CANARY = -12345.0


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.full(shape, CANARY, dtype=dtype), torch.full(
        (*shape[:-1], shape[-1] + 2), CANARY, dtype=dtype
    )


def new_tokens(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(*shape, seed=1, dtype=dtype), randn(*shape[:-1], shape[-1] + 2, seed=2, dtype=dtype)


# Where keys go


def test_positions_of_a_contiguous_cache() -> None:
    (k_cache, v_cache), (k, v) = caches(3, 10, 2, 8), new_tokens(3, 4, 2, 8)
    lengths = [0, 6, 3]
    assert append_kv(k_cache, v_cache, k, v, int32(*lengths)) is None
    for cache, new in ((k_cache, k), (v_cache, v)):
        expected = torch.full_like(cache, CANARY)
        for b, length in enumerate(lengths):
            expected[b, length : length + 4] = new[b]
        assert torch.equal(cache, expected)


def test_one_length_for_all() -> None:
    (k_cache, v_cache), (k, v) = caches(2, 10, 2, 8), new_tokens(2, 4, 2, 8)
    append_kv(k_cache, v_cache, k, v, 5)
    assert (
        torch.equal(k_cache[:, 5:9], k)
        and (k_cache[:, :5] == CANARY).all()
        and (v_cache[:, 9:] == CANARY).all()
    )


def test_packed_pages_and_rows() -> None:
    """Lengths 3, 0 and 5 in rows 2, 0 and 1 of the table; the tokens behind the last sequence go nowhere."""
    (k_cache, v_cache), (k, v) = caches(6, 3, 2, 8), new_tokens(10, 2, 8)
    table = [[4, -1, 99], [0, 3, 5], [99, 2, 1]]
    rows, lengths, ends = [2, 0, 1], [5, 0, 4], [0, 3, 3, 8]
    append_kv(
        k_cache, v_cache, k, v, int32(*lengths), cache_batch_idx=int32(*rows), block_table=int32(*table),
        cu_seqlens_k_new=int32(*ends), validate=True,
    )  # fmt: skip
    for cache, new in ((k_cache, k), (v_cache, v)):
        expected = torch.full_like(cache, CANARY)
        for b in range(3):
            for t in range(ends[b], ends[b + 1]):
                position = lengths[b] + t - ends[b]
                expected[table[rows[b]][position // 3], position % 3] = new[t]
        assert torch.equal(cache, expected)


def test_caches_of_any_strides() -> None:
    """Heads before positions in memory, keys and values in one tensor."""
    memory = torch.full((2, 2, 3, 10, 8), CANARY)  # (batch, key or value, heads, positions, head_dim)
    k_cache, v_cache = (memory[:, part].transpose(1, 2) for part in (0, 1))
    k, v = randn(2, 4, 3, 8, seed=1), randn(2, 4, 3, 8, seed=2)
    append_kv(k_cache, v_cache, k, v, int32(1, 6))
    expected = torch.full_like(memory, CANARY)
    for b, length in enumerate((1, 6)):
        for part, new in ((0, k), (1, v)):
            expected[b, part, :, length : length + 4] = new[b].transpose(0, 1)
    assert torch.equal(memory, expected)


OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "length": {"cache_seqlens": int32(8, 3)},
    "negative length": {"cache_seqlens": int32(-2, 3)},
    "huge length": {"cache_seqlens": int32(2**31 - 1, -(2**31))},
    "row": {"cache_batch_idx": int32(7, 1)},
    "negative row": {"cache_batch_idx": int32(-1, 1), "cache_seqlens": int32(3, 0)},
    "page": {"block_table": int32([0, 99], [2, 3]), "cache_seqlens": int32(3, 3)},
    "pages": {"block_table": int32([4, 1], [-5, -(2**31)]), "cache_seqlens": int32(3, 3)},
    "negative page": {"block_table": int32([-1, 0], [2, 3]), "cache_seqlens": int32(3, 3)},
    "row of the table": {"block_table": int32([0, 1], [2, 3]), "cache_batch_idx": int32(2, -1)},
    "end of the table": {"block_table": int32([0, 1], [2, 3]), "cache_seqlens": int32(8, 9)},
    "cumulative lengths": {"cu_seqlens_q": int32(0, 3, 999)},
    "padding": {"cache_leftpad": int32(2**31 - 1, -5)},
    "tokens before the first sequence": {
        "cu_seqlens_q": int32(2, 3, 8),
        "cache_seqlens": int32(5, 3),
        "cache_batch_idx": int32(1, 0),
    },
    "cumulative lengths that start late": {"cu_seqlens_q": int32(2, 3, 8), "cache_seqlens": int32(5, 3)},
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_data_out_of_range_harms_nobody(name: str, rotary: bool, batch_invariant: bool) -> None:
    """What has a place is written there, the rest nowhere; what is not there is seen by nobody."""
    places = {"cache_seqlens": int32(0, 3), **OUT_OF_RANGE[name]}
    paged, packed = "block_table" in places, "cu_seqlens_q" in places
    shape = (4, 5, 1, 8) if paged else (2, 10, 1, 8)
    memory = [torch.full((shape[0] + 4, *shape[1:]), CANARY) for _ in range(2)]
    k_cache, v_cache = (x[2:-2].copy_(randn(*shape, seed=n)) for n, x in enumerate(memory, start=6))
    k, v = (randn(*(8,) if packed else (2, 4), 1, 8, seed=seed) for seed in (1, 2))
    q = randn(*k.shape[:-2], 2, 8, seed=3)
    rotary_tables = {"rotary_cos": randn(10, 4, seed=4), "rotary_sin": randn(10, 4, seed=5)} if rotary else {}
    expected = [x.clone() for x in memory]
    slots = places_of_new_tokens(places, *shape[:2], tokens=8)
    for token, (row, slot) in slots.items():
        for x, new in zip(expected, (k, v), strict=True):
            x[row + 2, slot] = new.reshape(8, 1, 8)[token]
    cache_seqlens = places.pop("cache_seqlens")
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        causal=True,
        return_softmax_lse=True,
        batch_invariant=batch_invariant,
        **places,
        **rotary_tables,
    )
    assert out.shape == q.shape and out.isfinite().all() and not lse.isnan().any()
    if not rotary:
        assert torch.equal(memory[0], expected[0])
    untouched = expected[0] == memory[0]
    assert untouched.all(dim=-1).sum() >= untouched[..., 0].numel() - len(slots)
    assert (memory[0][:2] == CANARY).all() and (memory[0][-2:] == CANARY).all()
    assert torch.equal(memory[1], expected[1])
    unseen = {
        "row": [0], "negative row": [0], "row of the table": [0, 1], "pages": [1], "huge length": [0, 1],
        "padding": [0],
    }.get(name, [])  # fmt: skip
    for b in unseen:
        assert (out[b] == 0).all() and (lse[b] == -float("inf")).all()
    if not packed:
        assert all((out[b] != 0).any() for b in range(2) if b not in unseen)


def places_of_new_tokens(
    places: dict[str, Tensor], rows: int, slots: int, tokens: int
) -> dict[int, tuple[int, int]]:
    """Row and slot of each of the new tokens of two sequences that has a place."""
    ends = places["cu_seqlens_q"].tolist() if "cu_seqlens_q" in places else [0, 4, 8]
    table = places["block_table"].tolist() if "block_table" in places else None
    found = {}
    for b in range(2):
        row = int(places["cache_batch_idx"][b]) if "cache_batch_idx" in places else b
        for token in range(ends[b], min(ends[b + 1], tokens)):
            position = int(places["cache_seqlens"][b]) + token - ends[b]
            if table is None:
                place = row, position
            elif 0 <= row < len(table) and 0 <= position < len(table[row]) * slots:
                place = table[row][position // slots], position % slots
            else:
                continue
            if 0 <= place[0] < rows and 0 <= place[1] < slots:
                found[token] = place
    return found


# Rotary embedding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [2, 6, 16, 18])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rotary(
    dtype: torch.dtype, rotary_dim: int, interleaved: bool, per_position: bool, packed: bool
) -> None:
    """Against complex numbers: keys at their position in the cache, queries at theirs or at that of the first."""
    B, S, H, Hk, D = 2, 5, 4, 2, 18
    angle = 10.0 * randn(20, rotary_dim // 2, seed=3, dtype=torch.float64)
    table_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    cos, sin = angle.cos().to(table_dtype), angle.sin().to(table_dtype)
    q, k, v = randn(B, S, H, D, dtype=dtype), *new_tokens(B, S, Hk, D, dtype=dtype)
    k_cache, v_cache = caches(B, 20, Hk, D, dtype=dtype)
    lengths = [3, 11]
    packing = {"cu_seqlens_q": int32(0, 5, 10)} if packed else {}
    given = (x.flatten(0, 1) if packed else x for x in (q, k, v))
    rotated = append_kv(
        k_cache, v_cache, *list(given)[1:], int32(*lengths), q=q.flatten(0, 1) if packed else q, rotary_cos=cos,
        rotary_sin=sin, rotary_interleaved=interleaved, rotate_q_per_position=per_position, **packing,
    )  # fmt: skip
    assert rotated is not None and rotated.dtype == dtype and rotated.is_contiguous()
    rotated = rotated.reshape(q.shape)
    for b, length in enumerate(lengths):
        keys, first = torch.arange(length, length + S), torch.full((S,), length)
        for actual, x, position in (
            (k_cache[b, length : length + S], k[b], keys),
            (rotated[b], q[b], keys if per_position else first),
        ):
            expected = rotary_by_complex_numbers(x, angle[position], interleaved)
            plain = rotary_by_complex_numbers(
                x, torch.atan2(sin.double(), cos.double())[position], interleaved
            )
            assert_within_reference_error(actual, expected, plain.to(dtype), atol=1e-6)
            assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])
        assert torch.equal(v_cache[b, length : length + S], v[b])


@pytest.mark.parametrize(
    ("options", "per_position"),
    [
        ({}, False),
        ({"causal": True}, True),
        ({"window_size": (50, -1)}, True),
        ({"window_size": (-1, 50)}, True),
    ],
)
def test_when_queries_are_rotated_at_their_own_position(options: dict[str, Any], per_position: bool) -> None:
    q, (k, v) = randn(2, 5, 4, 8), new_tokens(2, 5, 2, 8)
    rotary = {"rotary_cos": randn(20, 4, seed=4), "rotary_sin": randn(20, 4, seed=5)}
    lengths = int32(3, 11)
    first, second = caches(2, 20, 2, 8), caches(2, 20, 2, 8)
    for cache in (*first, *second):
        cache.copy_(randn(*cache.shape, seed=6))
    actual = flash_attn_with_kvcache(q, *first, k, v, cache_seqlens=lengths, **rotary, **options)
    rotated = append_kv(*second, k, v, lengths, q=q, rotate_q_per_position=per_position, **rotary)
    assert torch.equal(
        actual, flash_attn_with_kvcache(rotated, *second, cache_seqlens=lengths + 5, **options)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# As an operator


def arguments(layout: str = "paged") -> dict[str, Any]:
    """Of flash_attn_with_kvcache, with rotary embedding and new keys."""
    common = {
        "cache_seqlens": int32(3, 0),
        "rotary_cos": randn(24, 4, seed=4),
        "rotary_sin": randn(24, 4, seed=5),
        "causal": True,
    }
    if layout == "dense":
        k, v = new_tokens(2, 5, 2, 8)
        k_cache, v_cache = (randn(2, 24, 2, n, seed=n) for n in (8, 10))
        return {"q": randn(2, 5, 4, 8), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, **common}
    k, v = new_tokens(9, 2, 8)
    k_cache, v_cache = (randn(7, 6, 2, n, seed=n) for n in (8, 10))
    return {
        "q": randn(9, 4, 8), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, **common,
        "cu_seqlens_q": int32(0, 1, 9), "block_table": int32([5, 1, 2, 4], [6, 0, 3, 3]),
        "cache_batch_idx": int32(1, 0), "cache_leftpad": int32(1, 0), "alibi_slopes": torch.ones(4),
        "learnable_sink": torch.ones(4), "num_splits": 2, "window_size": (4, -1), "softcap": 2.0,
        "softmax_scale": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("with_q", [False, True])
def test_opcheck_of_the_append(layout: str, with_q: bool) -> None:
    x = arguments(layout)
    cu_seqlens = x.get("cu_seqlens_q")
    operators = kvcache_operators.choose_operators(torch.device("cpu"), torch.float32, 8, 10)
    torch.library.opcheck(
        operators.append_kv,
        (
            x["k_cache"], x["v_cache"], x["k"], x["v"], x["cache_seqlens"], x["q"] if with_q else None,
            x["rotary_cos"] if with_q else None, x["rotary_sin"] if with_q else None, True, True,
            x.get("block_table"), x.get("cache_batch_idx"), cu_seqlens if with_q else None, cu_seqlens,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_opcheck_of_the_attention(layout: str, batch_invariant: bool) -> None:
    x = arguments(layout)
    operators = kvcache_operators.choose_operators(torch.device("cpu"), torch.float32, 8, 10)
    torch.library.opcheck(
        operators.decode,
        (
            x["q"], x["k_cache"], x["v_cache"], x["cache_seqlens"] + 1, 0.3, 5, 0, 1.0, 0, batch_invariant,
            x.get("block_table"), x.get("cache_batch_idx"), x.get("cu_seqlens_q"), x.get("cache_leftpad"),
            torch.ones(1, 4), torch.ones(4),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_opcheck_of_both_together(layout: str) -> None:
    x = arguments(layout)
    cu_seqlens = x.get("cu_seqlens_q")
    operators = kvcache_operators.choose_operators(torch.device("cpu"), torch.float32, 8, 10)
    torch.library.opcheck(
        operators.append_and_decode,
        (
            x["q"], x["k_cache"], x["v_cache"], x["cache_seqlens"], x["k"], x["v"], 0.3, 5, 0, 1.0, 0, False,
            x["rotary_cos"], x["rotary_sin"], True, x.get("block_table"), x.get("cache_batch_idx"), cu_seqlens,
            cu_seqlens, x.get("cache_leftpad"), torch.ones(1, 4), torch.ones(4),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", kvcache_operators.SCHEMAS)
def test_portable_operators_have_the_signatures_of_the_compiled_ones(name: str) -> None:
    error = library.load_error()
    if error is not None:
        pytest.skip(error)
    portable, compiled = (
        str(getattr(torch.ops.flash_attn_kernels, x).default._schema) for x in (f"portable_{name}", name)
    )
    assert portable.replace("portable_", "") == compiled


def call_and_caches(function: Any, x: dict[str, Any]) -> list[Tensor]:
    x = copy.deepcopy(x)
    out = function(**x)
    return [*(out if isinstance(out, tuple) else (out,)), x["k_cache"], x["v_cache"]]


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(layout: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = arguments(layout)
    for changed in (
        x,
        {**x, "cache_seqlens": int32(4, 2)},
        {**x, "cache_seqlens": 2, "return_softmax_lse": True},
    ):
        for a, b in zip(
            call_and_caches(compiled, changed), call_and_caches(flash_attn_with_kvcache, changed), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=counting)
    for length in range(6):
        x = arguments("dense") | {"cache_seqlens": int32(length, 2 * length)}
        for a, b in zip(
            call_and_caches(compiled, x), call_and_caches(flash_attn_with_kvcache, x), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_an_append_alone_compiles() -> None:
    """The write is seen: what reads the cache afterwards reads the new keys."""
    torch._dynamo.reset()

    def step(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        before = k_cache.sum()
        append_kv(k_cache, v_cache, k, v, lengths)
        return k_cache.sum() - before

    (k, v), lengths = new_tokens(2, 3, 2, 8), int32(0, 4)
    eager, compiled = ([torch.zeros(2, 9, 2, n) for n in (8, 10)] for _ in range(2))
    expected = step(*eager, k, v, lengths)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, k, v, lengths)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(expected, k.sum())
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_meta_tensors() -> None:
    x = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments().items()
    }
    out, lse = flash_attn_with_kvcache(**x, return_softmax_lse=True)
    assert out.is_meta and out.shape == (9, 4, 10) and lse.shape == (4, 9) and lse.dtype == torch.float32


def test_the_compiled_library_still_loads() -> None:
    """It defines operators in the same namespace."""
    if not library.LIBRARY_PATH.exists():
        pytest.skip("there is no compiled library")
    assert library.load_error() is None


class Decoder(torch.nn.Module):
    """A layer with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(2, 16, 2, 8))
        self.register_buffer("v_cache", torch.zeros(2, 16, 2, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> Tensor:
        return flash_attn_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=cache_seqlens, causal=True
        )


def test_exports() -> None:
    eager, traced = Decoder(), Decoder()
    q, k, v = randn(2, 1, 4, 8), randn(2, 1, 2, 8, seed=1), randn(2, 1, 2, 8, seed=2)
    tokens = torch.export.Dim("tokens", min=1, max=16)
    sizes = {name: {1: tokens} for name in "qkv"} | {"cache_seqlens": None}
    three = [torch.cat([x] * 3, dim=1) for x in (q, k, v)]
    exported = torch.export.export(traced, (*three, int32(0, 0)), dynamic_shapes=sizes)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert any("portable_append_and_decode" in name for name in names)
    module = exported.module()
    for step, tensors in enumerate(([q, k, v], three, [q, k, v])):
        lengths = int32(2 * step, 3 * step)
        torch.testing.assert_close(module(*tensors, lengths), eager(*tensors, lengths))
    torch.testing.assert_close(module.state_dict()["k_cache"], eager.k_cache)
    assert eager.k_cache.abs().sum() > 0


def test_autograd_learns_of_the_write() -> None:
    """A graph that has saved the cache refuses to use it after it was written."""
    k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    x = torch.ones(1, 4, 1, 8, requires_grad=True)
    product = (x * k_cache).sum()
    with torch.no_grad():
        append_kv(k_cache, v_cache, k_cache[:, :1] + 1, v_cache[:, :1] + 1, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    with mode():
        x = arguments()
        x = {
            name: value.requires_grad_() if name == "q" and mode is torch.no_grad else value
            for name, value in x.items()
        }
        out = flash_attn_with_kvcache(**x)
        assert not out.requires_grad
    expected = flash_attn_with_kvcache(**arguments())
    assert torch.equal(out, expected)


def test_a_cache_of_inference_mode_goes_on_outside_of_it() -> None:
    """Filled under inference_mode, continued under no_grad."""
    with torch.inference_mode():
        x = arguments()
    expected = call_and_caches(flash_attn_with_kvcache, arguments())
    with torch.no_grad():
        out = flash_attn_with_kvcache(**x)
    assert x["k_cache"].is_inference() and x["v_cache"].is_inference()
    assert all(map(torch.equal, (out, x["k_cache"], x["v_cache"]), expected))


def test_autocast_takes_the_dtype_of_the_cache() -> None:
    """And what is computed inside keeps its own precision."""
    x = arguments("dense")
    low = {name: x[name].bfloat16() for name in ("q", "k", "v", "k_cache", "v_cache")}
    expected = call_and_caches(flash_attn_with_kvcache, {**x, **low})
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {
            **x,
            **low,
            "q": low["q"].float(),
            "k": low["k"].float(),
            "v": low["v"].half().bfloat16().float(),
        }
        actual = call_and_caches(flash_attn_with_kvcache, mixed)
        wide = call_and_caches(flash_attn_with_kvcache, x)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-2)
    assert torch.equal(actual[1], expected[1]) and actual[0].dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(wide, call_and_caches(flash_attn_with_kvcache, x), strict=True)
    )


def test_explain_says_why_a_cache_runs_portably() -> None:
    k_cache = torch.zeros(2, 8, 2, 12, dtype=torch.float64)
    explanation = explain_kvcache(k_cache, k_cache)
    assert explanation.path == "portable"
    assert "tensors are on cpu, the CUDA kernels need an NVIDIA GPU" in str(explanation)
    with pytest.raises(ValueError, match=r"v_cache: got dtype torch.float32"):
        explain_kvcache(k_cache, k_cache.float())
