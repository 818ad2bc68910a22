"""Misuse of a cache raises a ValueError that says what and how, before the cache is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import append_kv, flash_attn_with_kvcache
from torch import Tensor
from torch.autograd import forward_ad


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes: Any) -> dict[str, Any]:
    return {
        "q": torch.ones(2, 3, 4, 8), "k_cache": torch.zeros(2, 10, 2, 8), "v_cache": torch.zeros(2, 10, 2, 6),
        "k": torch.ones(2, 3, 2, 8), "v": torch.ones(2, 3, 2, 6), "cache_seqlens": int32(4, 0), **changes,
    }  # fmt: skip


def paged(**changes: Any) -> dict[str, Any]:
    return {
        "q": torch.ones(7, 4, 8), "k_cache": torch.zeros(6, 4, 2, 8), "v_cache": torch.zeros(6, 4, 2, 6),
        "k": torch.ones(7, 2, 8), "v": torch.ones(7, 2, 6), "cache_seqlens": int32(4, 0),
        "cu_seqlens_q": int32(0, 3, 7), "block_table": int32([0, 1, 2], [3, 4, 5]), **changes,
    }  # fmt: skip


NO_NEW = {"k": None, "v": None}
TABLES = {"rotary_cos": torch.ones(12, 4), "rotary_sin": torch.ones(12, 4)}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no queries", dense(q=None), r"q: got None; expected queries"),
    ("list", dense(q=[1.0]), r"q: got list; expected a torch.Tensor"),
    ("cache that is no tensor", dense(k_cache=None), r"k_cache: got NoneType; expected a torch.Tensor"),
    (
        "rank of a cache",
        dense(v_cache=torch.zeros(2, 10, 6)),
        r"v_cache: got shape \(2, 10, 6\); expected shape \(batch",
    ),
    (
        "rank of pages",
        paged(k_cache=torch.zeros(24, 2, 8)),
        r"k_cache: .* expected shape \(num_pages, page_size, heads",
    ),
    (
        "integer cache",
        dense(k_cache=torch.zeros(2, 10, 2, 8).int()),
        r"k_cache: got dtype torch.int32; expected a float",
    ),
    (
        "no heads",
        dense(k_cache=torch.zeros(2, 10, 0, 8)),
        r"k_cache: got shape \(2, 10, 0, 8\); expected at least 1 head",
    ),
    (
        "last dimension of a cache",
        dense(k_cache=torch.zeros(2, 10, 2, 16)[..., ::2]),
        r"k_cache: got strides \(320, 32, 16, 2\); expected a contiguous last dimension.*in place",
    ),
    ("last dimension of values", dense(v_cache=torch.zeros(2, 10, 6, 2).mT), r"v_cache: got strides"),
    (
        "expanded cache",
        dense(k_cache=torch.zeros(1, 10, 2, 8).expand(2, -1, -1, -1)),
        r"k_cache: got strides \(0, ",
    ),
    (
        "length of v_cache",
        dense(v_cache=torch.zeros(2, 9, 2, 6)),
        r"v_cache: got shape .* the leading shape of k_cache",
    ),
    ("dtype of v_cache", dense(v_cache=torch.zeros(2, 10, 2, 6).half()), r"v_cache: got dtype torch.float16"),
    (
        "device of v_cache",
        dense(v_cache=torch.zeros(2, 10, 2, 6, device="meta")),
        r"v_cache: got device meta",
    ),
    (
        "page size",
        paged(k_cache=torch.zeros(6, 0, 2, 8), v_cache=torch.zeros(6, 0, 2, 6)),
        r"k_cache: got a page size of 0",
    ),
    (
        "packed q",
        dense(q=torch.ones(6, 4, 8)),
        r"q: got shape \(6, 4, 8\); expected shape \(batch.*cu_seqlens_q",
    ),
    ("dense q", paged(q=torch.ones(2, 3, 4, 8)), r"q: got shape \(2, 3, 4, 8\); expected shape \(total_q"),
    (
        "dtype of q",
        dense(q=torch.ones(2, 3, 4, 8).half()),
        r"q: got dtype torch.float16; expected the dtype of k_cache",
    ),
    (
        "device of q",
        dense(q=torch.ones(2, 3, 4, 8, device="meta")),
        r"q: got device meta; expected the device of k_cache",
    ),
    (
        "head dim of q",
        dense(q=torch.ones(2, 3, 4, 6)),
        r"q: got head_dim 6; expected the head_dim of k_cache, 8",
    ),
    (
        "heads of q",
        dense(q=torch.ones(2, 3, 3, 8)),
        r"q: got 3 heads; expected a multiple of the 2 heads of k_cache",
    ),
    (
        "batch of q",
        dense(q=torch.ones(3, 3, 4, 8), **NO_NEW, cache_seqlens=None),
        r"k_cache: got batch 2; expected one row",
    ),
    ("k alone", dense(v=None), r"v: got None; expected new ones, as k is given"),
    ("v alone", dense(k=None), r"k: got None; expected new ones, as v is given"),
    ("rank of k", dense(k=torch.ones(3, 8)), r"k: got shape \(3, 8\); expected \(batch, new tokens"),
    (
        "length of v",
        dense(v=torch.ones(2, 4, 2, 6)),
        r"v: got shape \(2, 4, 2, 6\); expected the leading shape of k",
    ),
    (
        "dtype of k",
        dense(k=torch.ones(2, 3, 2, 8).bfloat16()),
        r"k: got dtype torch.bfloat16; expected the dtype of k_cache",
    ),
    (
        "dtype of v",
        dense(v=torch.ones(2, 3, 2, 6).double()),
        r"v: got dtype torch.float64; expected the dtype of v_cache",
    ),
    ("device of k", dense(k=torch.ones(2, 3, 2, 8, device="meta")), r"k: got device meta"),
    (
        "heads of k",
        dense(k=torch.ones(2, 3, 4, 8), v=torch.ones(2, 3, 4, 6)),
        r"k: got shape .* heads and head_dim of k_cache",
    ),
    (
        "head dim of v",
        dense(v=torch.ones(2, 3, 2, 8)),
        r"v: got shape .* heads and head_dim of v_cache, \(2, 6\)",
    ),
    (
        "batch of k",
        dense(k=torch.ones(1, 3, 2, 8), v=torch.ones(1, 3, 2, 6)),
        r"k: got batch 1; expected the batch of q, 2",
    ),
    (
        "too many keys",
        dense(k=torch.ones(2, 11, 2, 8), v=torch.ones(2, 11, 2, 6)),
        r"k: got 11 new keys .* at most the 10",
    ),
    (
        "packed k",
        dense(k=torch.ones(6, 2, 8), v=torch.ones(6, 2, 6)),
        r"cu_seqlens_k_new: got None; expected cumulative",
    ),
    (
        "sequences of k",
        paged(cu_seqlens_k_new=int32(0, 3)),
        r"cu_seqlens_k_new: got 1 sequences; expected the 2 of q",
    ),
    (
        "tokens of k",
        paged(k=torch.ones(5, 2, 8), v=torch.ones(5, 2, 6)),
        r"k: got 5 packed tokens; expected the 7 of q",
    ),
    (
        "lengths of dense k",
        dense(cu_seqlens_k_new=int32(0, 3, 6)),
        r"cu_seqlens_k_new: .* k has a batch dimension",
    ),
    (
        "lengths of no k",
        paged(**NO_NEW, cu_seqlens_k_new=int32(0, 3, 6)),
        r"cu_seqlens_k_new: .* as k is None",
    ),
    (
        "no lengths",
        dense(cache_seqlens=None),
        r"cache_seqlens: got None; expected the lengths before the append",
    ),
    (
        "long lengths",
        dense(cache_seqlens=int32(4, 0).long()),
        r"cache_seqlens: got dtype torch.int64; expected torch.int32",
    ),
    ("number of lengths", dense(cache_seqlens=int32(1, 2, 3)), r"cache_seqlens: got shape \(3,\); .* \(2,\)"),
    ("float length", dense(cache_seqlens=1.0), r"cache_seqlens: got float; expected an int"),
    ("bool length", dense(cache_seqlens=True), r"cache_seqlens: got bool; expected an int"),
    (
        "negative length",
        dense(cache_seqlens=-1),
        r"cache_seqlens: got -1, and 3 new keys; expected a length >= 0",
    ),
    (
        "no room",
        dense(cache_seqlens=8),
        r"cache_seqlens: got 8, and 3 new keys; expected .* room for them in 10 positions",
    ),
    ("no room at all", dense(**NO_NEW, cache_seqlens=11), r"cache_seqlens: got 11, and 0 new keys"),
    (
        "rows",
        dense(cache_batch_idx=int32(0)),
        r"cache_batch_idx: got shape \(1,\); expected an int32 tensor of shape \(2,\)",
    ),
    ("long rows", dense(cache_batch_idx=torch.tensor([0, 1])), r"cache_batch_idx: got dtype torch.int64"),
    ("padding", dense(cache_leftpad=[1, 2]), r"cache_leftpad: got list; expected an int32 tensor"),
    ("device of padding", dense(cache_leftpad=int32(1, 1).to("meta")), r"cache_leftpad: got device meta"),
    ("table list", paged(block_table=[[0]]), r"block_table: got list; expected a torch.Tensor"),
    (
        "rank of the table",
        paged(block_table=int32(0, 1)),
        r"block_table: got shape \(2,\); expected \(batch, max_pages\)",
    ),
    (
        "rows of the table",
        paged(block_table=int32([0, 1])),
        r"block_table: got shape \(1, 2\); expected \(2, max_pages\)",
    ),
    (
        "long table",
        paged(block_table=torch.zeros(2, 3).long()),
        r"block_table: got dtype torch.int64; expected torch.int32",
    ),
    ("device of the table", paged(block_table=int32([0], [1]).to("meta")), r"block_table: got device meta"),
    (
        "cumulative lengths",
        paged(cu_seqlens_q=int32(0, 3, 7).float()),
        r"cu_seqlens_q: got dtype torch.float32",
    ),
    (
        "no cumulative lengths",
        paged(cu_seqlens_q=int32([0, 3, 7])),
        r"cu_seqlens_q: got shape \(1, 3\); .* \(batch \+ 1,\)",
    ),
    (
        "cos alone",
        dense(rotary_cos=torch.ones(10, 4)),
        r"rotary_sin: got None; expected a table, as rotary_cos is given",
    ),
    ("sin alone", dense(rotary_sin=torch.ones(10, 4)), r"rotary_cos: got None"),
    (
        "rotary without keys",
        dense(**NO_NEW, **TABLES),
        r"rotary_cos: got a table without new keys; expected k and v",
    ),
    (
        "short tables",
        dense(rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4)),
        r"rotary_cos: got 9 .* at least the 10",
    ),
    (
        "wide tables",
        dense(rotary_cos=torch.ones(10, 5), rotary_sin=torch.ones(10, 5)),
        r"rotary_cos: got shape \(10, 5\); .* <= 8",
    ),
    (
        "tables of two shapes",
        dense(rotary_cos=torch.ones(10, 4), rotary_sin=torch.ones(10, 3)),
        r"rotary_sin: got shape \(10, 3\)",
    ),
    (
        "tables without columns",
        dense(rotary_cos=torch.ones(10, 0), rotary_sin=torch.ones(10, 0)),
        r"rotary_cos: got shape",
    ),
    (
        "dtype of tables",
        dense(rotary_cos=torch.ones(10, 4).half(), rotary_sin=torch.ones(10, 4).half()),
        r"rotary_cos: got dtype",
    ),
    (
        "device of tables",
        dense(**{n: x.to("meta") for n, x in TABLES.items()}),
        r"rotary_cos: got device meta",
    ),
    (
        "slopes",
        dense(alibi_slopes=torch.ones(3)),
        r"alibi_slopes: got shape \(3,\); expected \(4,\) or \(2, 4\)",
    ),
    ("sink", dense(learnable_sink=torch.ones(2)), r"learnable_sink: got shape \(2,\); expected \(4,\)"),
    ("scale", dense(softmax_scale=float("nan")), r"softmax_scale: got nan; expected a finite number"),
    ("softcap", dense(softcap=-1.0), r"softcap: got -1.0"),
    ("window", dense(window_size=(-2, 0)), r"window_size: got \(-2, 0\)"),
    ("no window", dense(window_size=None), r"window_size: got None; expected \(left, right\) integers"),
    ("window of None", dense(window_size=(None, 0)), r"window_size: got \(None, 0\)"),
    ("no softcap", dense(softcap=None), r"softcap: got None; expected a number"),
    ("word as a scale", dense(softmax_scale="auto"), r"softmax_scale: got 'auto'; expected a number"),
    ("negative splits", dense(num_splits=-1), r"num_splits: got -1; expected an integer in \[0, 256\]"),
    ("many splits", dense(num_splits=257), r"num_splits: got 257"),
    (
        "splits under invariance",
        dense(num_splits=2, batch_invariant=True),
        r"num_splits: got 2; expected 0 or 1 with batch_inv",
    ),
    ("strict", dense(strict=True), r"strict: .*tensors are on cpu"),
]

VALUES: list[tuple[str, dict[str, Any], str]] = [
    (
        "no room",
        dense(cache_seqlens=int32(0, 8)),
        r"cache_seqlens: got 8 for sequence 1, and 3 new keys; .* 10 positions",
    ),
    (
        "no room in pages",
        paged(cache_seqlens=int32(10, 0)),
        r"cache_seqlens: got 10 for sequence 0, and 3 new .* 12 positions",
    ),
    ("negative", dense(cache_seqlens=int32(-1, 8)), r"cache_seqlens: got -1 for sequence 0"),
    (
        "without new keys",
        dense(**NO_NEW, cache_seqlens=int32(3, 11)),
        r"cache_seqlens: got 11 for sequence 1, and 0 new keys",
    ),
    (
        "row",
        dense(cache_batch_idx=int32(0, 2)),
        r"cache_batch_idx: got 2 for sequence 1; expected rows in \[0, 2\)",
    ),
    ("negative row", dense(cache_batch_idx=int32(-1, 1)), r"cache_batch_idx: got -1 for sequence 0"),
    (
        "row of the table",
        paged(cache_batch_idx=int32(0, 2)),
        r"cache_batch_idx: got 2 for sequence 1; expected rows in \[0, 2\)",
    ),
    (
        "row twice",
        dense(cache_batch_idx=int32(1, 1), cache_seqlens=4),
        r"cache_batch_idx: got one slot .* sequences 0 and 1",
    ),
    (
        "padding",
        dense(cache_leftpad=int32(2, 4)),
        r"cache_leftpad: got 4 for sequence 1; expected at most its 3 keys",
    ),
    ("negative padding", dense(cache_leftpad=int32(-1, 0)), r"cache_leftpad: got -1 for sequence 0"),
    (
        "page that is read",
        paged(block_table=int32([6, 1, 2], [3, 4, 5])),
        r"block_table: got \[6, 1\] for sequence 0; .*\[0, 6\)",
    ),
    (
        "page that is written",
        paged(block_table=int32([0, -1, 2], [3, 4, 5])),
        r"block_table: got \[0, -1\] for sequence 0",
    ),
    (
        "page behind the padding",
        paged(block_table=int32([-1, 9, 2], [3, 4, 5]), cache_leftpad=int32(4, 0)),
        r"block_table: got \[9\] for sequence 0",
    ),
    (
        "page twice",
        paged(block_table=int32([0, 3, 2], [3, 4, 5])),
        r"block_table: got one slot .* Fix: copy a shared page",
    ),
    (
        "falling",
        paged(cu_seqlens_q=int32(0, 5, 3)),
        r"cu_seqlens_q: got \[0, 5, 3\]; expected cumulative lengths",
    ),
    ("late", paged(cu_seqlens_q=int32(1, 3, 7)), r"cu_seqlens_q: got \[1, 3, 7\]"),
    (
        "too many tokens",
        paged(cu_seqlens_q=int32(0, 3, 8)),
        r"cu_seqlens_q: got a total of 8; expected at most 7 tokens",
    ),
    ("too many new keys", paged(cu_seqlens_k_new=int32(0, 3, 8)), r"cu_seqlens_k_new: got a total of 8"),
    (
        "queries behind the tables",
        dense(q=torch.ones(2, 9, 4, 8), rotary_cos=torch.ones(12, 4), rotary_sin=torch.ones(12, 4)),
        r"rotary_cos: got 12 positions; expected at least 13, for the queries",
    ),
]


def assert_refused(function: Any, arguments: dict[str, Any], message: str) -> None:
    caches = [x for x in (arguments["k_cache"], arguments["v_cache"]) if isinstance(x, Tensor)]
    with pytest.raises(ValueError, match=message) as error:
        function(**arguments)
    assert " Fix: " in str(error.value)
    assert all((x == 0).all() for x in caches if not x.is_meta), "the cache was touched"


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    for _ in range(2):  # what was refused once is not taken for checked
        assert_refused(flash_attn_with_kvcache, arguments, message)


@pytest.mark.parametrize(
    ("arguments", "message"), [case[1:] for case in VALUES], ids=[case[0] for case in VALUES]
)
def test_bad_values_on_request(arguments: dict[str, Any], message: str) -> None:
    assert_refused(flash_attn_with_kvcache, {**arguments, "validate": True}, message)


def test_the_cases_start_from_good_input() -> None:
    for good in (
        dense(),
        paged(),
        dense(**TABLES),
        dense(cache_seqlens=7),
        paged(cu_seqlens_k_new=int32(0, 1, 7)),
        paged(block_table=int32([-1, 1, 2], [3, 4, 5]), cache_leftpad=int32(4, 0)),
        dense(q=torch.ones(2, 9, 4, 8), rotary_cos=torch.ones(13, 4), rotary_sin=torch.ones(13, 4)),
        dense(cache_leftpad=int32(7, 3)),
    ):
        assert flash_attn_with_kvcache(**good, validate=True).isfinite().all()
        assert good["k_cache"].abs().sum() > 0


def test_an_empty_sequence_is_in_range() -> None:
    out = flash_attn_with_kvcache(**dense(**NO_NEW, cache_seqlens=int32(3, 0)), validate=True)
    assert (out[1] == 0).all()


def test_strides_are_checked_in_every_call() -> None:
    """Also if a call of the same shapes was good."""
    assert flash_attn_with_kvcache(**dense()).isfinite().all()
    strided = torch.zeros(2, 10, 2, 16)[..., ::2]
    assert_refused(
        flash_attn_with_kvcache, dense(k_cache=strided), r"k_cache: got strides \(320, 32, 16, 2\)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None}, r"k: got None; expected new keys"),
        ({"q": torch.ones(2, 3, 4, 8)}, r"q: got queries without rotary tables"),
        ({"cache_seqlens": None}, r"cache_seqlens: got None; expected the lengths before the append"),
        ({"cache_seqlens": 8}, r"cache_seqlens: got 8, and 3 new keys"),
        ({"cache_seqlens": int32(8, 8), "validate": True}, r"cache_seqlens: got 8 for sequence 0"),
        ({"k": torch.ones(6, 2, 8), "v": torch.ones(6, 2, 6)}, r"cu_seqlens_k_new: got None"),
        (
            {"k": torch.ones(3, 3, 2, 8), "v": torch.ones(3, 3, 2, 6)},
            r"k_cache: got batch 2; expected one row for each",
        ),
        ({"strict": True}, r"strict: .*tensors are on cpu"),
    ],
)
def test_bad_appends(changes: dict[str, Any], message: str) -> None:
    arguments = {name: x for name, x in dense().items() if name != "q"}
    if changes.get("k", arguments["k"]) is not None and changes.get("k", arguments["k"]).shape[0] == 3:
        changes = {**changes, "cache_seqlens": int32(0, 0, 0)}
    assert_refused(append_kv, {**arguments, **changes}, message)


@pytest.mark.parametrize(
    "name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "alibi_slopes", "learnable_sink"]
)
def test_gradients_are_refused(name: str) -> None:
    arguments = dense(**TABLES, alibi_slopes=torch.ones(4), learnable_sink=torch.ones(4))
    arguments[name].requires_grad_()
    try:
        assert_refused(
            flash_attn_with_kvcache, arguments, rf"{name}: got a tensor that requires a gradient.*no_grad"
        )
        with torch.no_grad():
            assert not flash_attn_with_kvcache(**arguments).requires_grad
    finally:
        TABLES["rotary_cos"].requires_grad_(False)


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.enable_grad])
def test_tangents_are_refused(gradients: Any) -> None:
    with gradients(), forward_ad.dual_level():
        for name in ("q", "k_cache", "v"):
            arguments = dense()
            arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
            assert_refused(flash_attn_with_kvcache, arguments, rf"{name}: got a tensor with a tangent")
        assert flash_attn_with_kvcache(**dense()).isfinite().all()
