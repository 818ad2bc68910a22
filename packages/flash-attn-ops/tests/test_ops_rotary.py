"""Rotary embedding away from the GPU: the reference, the options, the module, rejected arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flash_attn_ops.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qk,
    apply_rotary_emb_qkv_,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def as_complex(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Each pair as one complex number times e^(i angle); x (B, S, H, D) in float64, angle (B, S, R/2)."""
    size = 2 * angle.shape[-1]
    pairs = x[..., :size].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    factor = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    turned = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    return torch.cat([turned, x[..., size:]], dim=-1)


@LAYOUTS
@pytest.mark.parametrize(
    "offsets", [0, 4, torch.tensor([3, 0]), torch.tensor([1, 6], dtype=torch.int32)], ids=str
)
@pytest.mark.parametrize("rotary_dim", [12, 6])
def test_against_complex_numbers(interleaved: bool, offsets: int | Tensor, rotary_dim: int) -> None:
    x, angle = torch.randn(2, 5, 3, 12, dtype=FP64), torch.randn(11, rotary_dim // 2, dtype=FP64)
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets, offsets]
    expected = as_complex(x, torch.stack([angle[start : start + 5] for start in starts]), interleaved)
    out = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved, seqlen_offsets=offsets)
    torch.testing.assert_close(out, expected)
    copy = x.clone()
    assert apply_rotary_emb(copy, angle.cos(), angle.sin(), interleaved, True, offsets) is copy
    assert torch.equal(copy, out)


@LAYOUTS
@pytest.mark.parametrize("offsets", [2, torch.tensor([2, 9, 0, 1])], ids=str)
def test_packed_sequences_equal_separate_ones(interleaved: bool, offsets: int | Tensor) -> None:
    lengths = [3, 0, 4, 1]
    boundaries = torch.tensor([2, 5, 5, 9, 10], dtype=torch.int32)  # two tokens before, one after them all
    x, angle = torch.randn(11, 3, 12), torch.randn(10, 4)
    cos, sin = angle.cos(), angle.sin()
    out = apply_rotary_emb(
        x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=boundaries, max_seqlen=4
    )
    expected = x.clone()
    for i, length in enumerate(lengths):
        if length:
            own = slice(int(boundaries[i]), int(boundaries[i + 1]))
            start = int(offsets[i]) if isinstance(offsets, Tensor) else offsets
            expected[own] = apply_rotary_emb(x[None, own], cos, sin, interleaved, seqlen_offsets=start)[0]
    assert torch.equal(out, expected)
    hint_makes_no_difference = apply_rotary_emb(x, cos, sin, interleaved, False, offsets, boundaries.long())
    assert torch.equal(hint_makes_no_difference, expected)


@LAYOUTS
def test_gradcheck(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 2, 6, dtype=FP64, requires_grad=True), torch.randn(3, 2, dtype=FP64)
    cos, sin = angle.cos(), angle.sin()
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, cos, sin, interleaved), (x,))
    in_place = lambda x: apply_rotary_emb(x * 1, cos, sin, interleaved, inplace=True)  # noqa: E731
    assert torch.autograd.gradcheck(in_place, (x,))


def test_every_option_acts() -> None:
    x, (cos, sin) = torch.randn(1, 4, 2, 8), torch.randn(2, 9, 3)
    plain = apply_rotary_emb(x, cos, sin)
    assert torch.equal(plain[..., 6:], x[..., 6:])
    assert not torch.equal(plain, apply_rotary_emb(x, cos, sin, interleaved=True))
    assert not torch.equal(plain, apply_rotary_emb(x, cos, sin, seqlen_offsets=1))
    boundaries = torch.tensor([0, 1, 4])
    packed = apply_rotary_emb(x[0], cos, sin, cu_seqlens=boundaries)
    assert not torch.equal(plain[0], packed)
    with pytest.raises(ValueError, match="build a longer table"):
        apply_rotary_emb(x[0], cos[:2], sin[:2], cu_seqlens=boundaries, max_seqlen=3)


def test_dtypes() -> None:
    """16-bit values are turned in float32 and rounded once; what is not turned keeps its bits."""
    x, angle = torch.randn(1, 4, 2, 8).to(BF16), torch.randn(4, 3)
    out = apply_rotary_emb(x, angle.cos(), angle.sin())
    assert out.dtype == BF16 and torch.equal(
        out, apply_rotary_emb(x.float(), angle.cos(), angle.sin()).to(BF16)
    )
    assert torch.equal(out[..., 6:], x[..., 6:])


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = apply_rotary_emb(x, torch.ones(4, 4), torch.ones(4, 4), seqlen_offsets=torch.zeros(shape[0]).int())
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


def test_the_default_device_does_not_count() -> None:
    x, cos, sin = torch.randn(2, 3, 1, 4), *torch.randn(2, 9, 2)
    offsets, cu_seqlens = torch.tensor([1, 4]), torch.tensor([0, 2, 6])
    dense = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    how = {"seqlen_offsets": offsets, "cu_seqlens": cu_seqlens}
    packed = apply_rotary_emb(x.flatten(0, 1), cos, sin, **how)
    with torch.device("meta"):
        assert torch.equal(apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets), dense)
        assert torch.equal(apply_rotary_emb(x.flatten(0, 1), cos, sin, **how), packed)


def test_any_strides() -> None:
    cos, sin = torch.randn(2, 5, 4)
    qkv = torch.randn(2, 5, 3, 2, 8)
    before = qkv.clone()
    expected = apply_rotary_emb(qkv[:, :, 0].contiguous(), cos, sin)
    assert torch.equal(apply_rotary_emb(qkv[:, :, 0], cos, sin), expected)
    heads_first = qkv[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(apply_rotary_emb(heads_first, cos, sin), expected)
    apply_rotary_emb(qkv[:, :, 0], cos, sin, inplace=True)
    assert torch.equal(qkv[:, :, 0], expected) and torch.equal(qkv[:, :, 1:], before[:, :, 1:])


@LAYOUTS
def test_module_rotates_by_position_times_frequency(interleaved: bool) -> None:
    rotary = RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    q, k = torch.randn(2, 5, 3, 8, dtype=FP64), torch.randn(2, 5, 1, 8, dtype=FP64)
    frequency = torch.tensor([100.0 ** (-2 * i / 6) for i in range(3)], dtype=FP64)
    angle = ((torch.arange(5, dtype=FP64) + 7)[:, None] * frequency).expand(2, 5, 3)
    for rotated, x in zip(rotary(q, k, 7), (q, k), strict=True):
        torch.testing.assert_close(rotated, as_complex(x, angle, interleaved), atol=1e-6, rtol=1e-6)
    assert not torch.equal(
        rotary(q, k, 7)[0], RotaryEmbedding(6, base=50.0, interleaved=interleaved)(q, k, 7)[0]
    )


def test_growing_the_table_changes_no_value() -> None:
    """Bit for bit: decoding token by token is one pass over the sequence, whatever was asked before."""
    grown, fresh = RotaryEmbedding(16), RotaryEmbedding(16)
    before = [table.clone() for table in grown.tables(5, torch.device("cpu"))]
    for positions in (6, 100, 3001):
        for old, new in zip(before, grown.tables(positions, torch.device("cpu")), strict=True):
            assert torch.equal(old, new[:5])
    for old, new in zip(
        fresh.tables(3001, torch.device("cpu")), grown.tables(1, torch.device("cpu")), strict=True
    ):
        assert torch.equal(old[:3001], new[:3001])
    q = torch.randn(1, 9, 2, 16)
    whole, _ = RotaryEmbedding(16)(q, q)
    decoding = RotaryEmbedding(16)
    steps = [decoding(q[:, i : i + 1], q[:, i : i + 1], i)[0] for i in range(9)]
    assert torch.equal(torch.cat(steps, dim=1), whole)
    tensor_steps = [decoding(q[:, i : i + 1], q[:, :1], torch.tensor([i]), max_seqlen=9)[0] for i in range(9)]
    assert torch.equal(torch.cat([q[:, :0], *tensor_steps], dim=1), whole)


def test_a_table_is_made_once() -> None:
    """However its device is called."""
    rotary = RotaryEmbedding(4)
    cos, sin = rotary.tables(3, torch.device("cpu"))
    for device in ("cpu", torch.device("cpu", 0)):
        again = rotary.tables(3, device)
        assert again[0] is cos and again[1] is sin and rotary.key_tables(2, device)[0] is cos


def test_a_table_that_exists_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a model on several devices may share the module: computing the table takes the host a while."""
    rotary, q = RotaryEmbedding(4), torch.ones(1, 3, 2, 4)
    with torch.inference_mode():
        rotary(q, q)
    before = rotary.tables(3, "cpu")
    monkeypatch.setattr(rotary, "_table", None)
    assert rotary.tables(3, "meta")[0].is_meta
    monkeypatch.undo()
    assert all(torch.equal(old, new) for old, new in zip(before, rotary.tables(3, "cpu"), strict=True))
    with FakeTensorMode():
        rotary(torch.ones(1, 9, 2, 4), torch.ones(1, 9, 2, 4))
    assert torch.equal(rotary(q, q)[0], RotaryEmbedding(4)(q, q)[0])


def test_the_table_is_exact_and_stays_so() -> None:
    rotary = RotaryEmbedding(4).bfloat16()
    cos, sin = rotary.tables(100_001, torch.device("cpu"))
    assert cos.dtype == FP32 and not list(rotary.parameters()) and not rotary.state_dict()
    angle = 100_000 * 10000.0 ** (-2 / 4)
    assert abs(cos[100_000, 1].item() - math.cos(angle)) < 1e-7
    assert abs(sin[100_000, 0].item() - math.sin(100_000)) < 1e-7


def test_a_table_made_for_inference_serves_training() -> None:
    rotary = RotaryEmbedding(8)
    q = torch.randn(1, 3, 2, 8)
    with torch.inference_mode():
        rotary(q, q)
    leaf = q.clone().requires_grad_()
    rotary(leaf, leaf)[0].sum().backward()
    assert leaf.grad is not None


def test_compiles_to_one_graph() -> None:
    rotary = RotaryEmbedding(8)

    def block(q: Tensor, k: Tensor) -> Tensor:
        q, k = rotary(q * 2, k)
        return (q * k).sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seqlen in (3, 7):  # the table grows inside the graph
        leaves = [torch.randn(2, seqlen, 3, 8, requires_grad=True) for _ in range(2)]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        compiled(*leaves).backward()
        block(*copies).backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad)


X, COS = torch.ones(2, 4, 3, 8), torch.ones(6, 4)
GOOD = {"x": X, "cos": COS, "sin": COS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.long()}, r"x: got torch.int64; expected a floating-point dtype"),
        ({"x": X[0]}, r"x: got shape \(4, 3, 8\); expected \(B, S, H, D\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"x: got shape \(2, 4, 3, 8\); expected \(T, H, D\)"),
        ({"cos": COS[0]}, r"cos: got shape \(4,\); expected \(positions, R/2\)"),
        ({"sin": COS[:3]}, r"sin: got shape \(3, 4\); expected \(6, 4\), the shape of cos"),
        ({"cos": torch.ones(6, 5), "sin": torch.ones(6, 5)}, r"cos: got 5 columns.*expected 0 < R <= 8"),
        ({"cos": torch.ones(6, 0), "sin": torch.ones(6, 0)}, r"cos: got 0 columns"),
        ({"cos": COS.to("meta")}, r"cos: got a tensor on meta; expected cpu"),
        (
            {"cos": COS.clone().requires_grad_()},
            r"cos or sin: got a tensor that requires grad; expected constants",
        ),
        (
            {"seqlen_offsets": 3},
            r"seqlen_offsets: got tokens at positions up to 6; expected positions below 6",
        ),
        ({"seqlen_offsets": -1}, r"seqlen_offsets: got -1; expected no negative position"),
        ({"seqlen_offsets": torch.tensor([0, 3])}, r"seqlen_offsets: got tokens at positions up to 6"),
        ({"seqlen_offsets": torch.tensor([0, -3])}, r"seqlen_offsets: got -3"),
        (
            {"seqlen_offsets": torch.tensor([0])},
            r"seqlen_offsets: got shape \(1,\); expected \(2,\), one offset",
        ),
        (
            {"seqlen_offsets": torch.zeros(2)},
            r"seqlen_offsets: got torch.float32; expected torch.int32 or torch.int64",
        ),
        ({"x": None}, r"x: got None; expected a torch.Tensor"),
        ({"cos": None}, r"cos: got None; expected a torch.Tensor"),
        ({"x": X[0], "cu_seqlens": [0, 4]}, r"cu_seqlens: got list; expected a torch.Tensor of torch.int32"),
        ({"position_ids": [[0, 1, 2, 3]] * 2}, r"position_ids: got list; expected a torch.Tensor"),
        ({"seqlen_offsets": 1.0}, r"seqlen_offsets: got float; expected an int"),
        ({"max_seqlen": 4}, r"max_seqlen: got 4; expected None without cu_seqlens"),
        (
            {"x": X[0], "cu_seqlens": torch.tensor([0, 5])},
            r"cu_seqlens: got \[0, 5\]; expected non-decreasing values",
        ),
        ({"x": X[0], "cu_seqlens": torch.tensor([0, 3, 2])}, r"cu_seqlens: got \[0, 3, 2\]"),
        ({"x": X[0], "cu_seqlens": torch.tensor([0.0, 3.0])}, r"cu_seqlens: got torch.float32"),
        ({"x": X[0], "cu_seqlens": torch.tensor([0])}, r"cu_seqlens: got shape \(1,\); expected \(B \+ 1,\)"),
        (
            {"x": X.transpose(2, 3), "cos": COS[:, :1], "sin": COS[:, :1], "inplace": True},
            r"inplace: got x of strides",
        ),
        ({"x": X[:1].expand(2, 4, 3, 8), "inplace": True}, r"inplace: got x of strides"),
        (
            {"x": X.clone().requires_grad_(), "inplace": True},
            r"inplace: got a leaf tensor x that requires grad",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejected_arguments(change: dict, message: str) -> None:
    given = {**GOOD, **change}
    before = None if given["x"] is None else given["x"].clone()
    with pytest.raises(ValueError, match=message) as error:
        apply_rotary_emb(**given)
    assert "Fix: " in str(error.value)
    assert before is None or torch.equal(given["x"], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 5}, r"dim: got 5; expected a positive even number"),
        ({"dim": 0}, r"dim: got 0"),
        ({"dim": 4, "scaling": {"rope_type": "default"}}, r"scaling: got dict; .*from_hugging_face"),
        ({"dim": 4, "base": 0.0}, r"base: got 0.0; expected a positive number"),
    ],
    ids=str,
)
def test_rejected_module_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)


def test_rejected_forward_arguments() -> None:
    rotary = RotaryEmbedding(4)
    with pytest.raises(ValueError, match=r"q and k: got shapes \(2, 4, 3, 8\) and \(2, 3, 3, 8\)"):
        rotary(X, X[:, :3])
    with pytest.raises(ValueError, match=r"max_seqlen: got None; expected the number of positions"):
        rotary(X, X, torch.tensor([0, 1]))


QKV = torch.ones(2, 4, 3, 2, 8)


def test_queries_and_keys_together_are_each_by_itself() -> None:
    q, k, (cos, sin, cos_k, sin_k) = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 1, 8), torch.randn(4, 6, 4)
    for tables in ((cos, sin), (cos, sin, cos_k, sin_k)):
        rotated = apply_rotary_emb_qk(q, k, *tables, interleaved=True, seqlen_offsets=2)
        assert torch.equal(rotated[0], apply_rotary_emb(q, cos, sin, True, seqlen_offsets=2))
        assert torch.equal(rotated[1], apply_rotary_emb(k, *tables[-2:], True, seqlen_offsets=2))
    copies = q.clone(), k.clone()
    returned = apply_rotary_emb_qk(*copies, cos, sin, inplace=True)
    assert returned[0] is copies[0] and torch.equal(copies[1], apply_rotary_emb(k, cos, sin))


@pytest.mark.parametrize(
    "cu_seqlens", [None, torch.tensor([0, 3, 7], dtype=torch.int32)], ids=["dense", "packed"]
)
def test_packed_projections_are_their_parts(cu_seqlens: Tensor | None) -> None:
    """The layouts of one projection, packed sequences included; values pass."""
    cos, sin, cos_k, sin_k = torch.randn(4, 9, 3, dtype=FP64)
    options = {"cu_seqlens": cu_seqlens, "seqlen_offsets": torch.tensor([1, 2])}
    tokens = (2, 7) if cu_seqlens is None else (8,)

    def parts(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [apply_rotary_emb(q, cos, sin, **options), apply_rotary_emb(k, cos_k, sin_k, **options), v]

    qkv = torch.randn(*tokens, 3, 2, 8, dtype=FP64)
    expected = torch.stack(parts(*qkv.unbind(-3)), dim=-3)
    assert apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, **options) is qkv
    assert torch.equal(qkv, expected)
    grouped = torch.randn(*tokens, 7, 8, dtype=FP64)
    expected = torch.cat(parts(*grouped.split([3, 2, 2], dim=-2)), dim=-2)
    assert torch.equal(
        apply_rotary_emb_qkv_(grouped, cos, sin, cos_k, sin_k, num_heads_q=3, **options), expected
    )
    kv = torch.randn(*tokens, 2, 2, 8, dtype=FP64)
    expected = torch.stack(
        [apply_rotary_emb(kv.select(-3, 0), cos, sin, **options), kv.select(-3, 1)], dim=-3
    )
    assert torch.equal(apply_rotary_emb_kv_(kv, cos, sin, **options), expected)


def test_gradcheck_of_packed_projections() -> None:
    tables = torch.randn(4, 3, 2, dtype=FP64)
    qkv = torch.randn(1, 3, 3, 2, 6, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb_qkv_(x * 1, *tables), (qkv,))
    kv = torch.randn(3, 2, 2, 6, dtype=FP64, requires_grad=True)
    boundaries = torch.tensor([0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda x: apply_rotary_emb_kv_(x * 1, *tables[:2], cu_seqlens=boundaries), (kv,)
    )


@LAYOUTS
def test_position_ids(interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8), torch.randn(2, 20, 4)
    ids = torch.tensor([[3, 0, 19, 3, 7], [1, 2, 3, 4, 5]], dtype=torch.int32)
    out = apply_rotary_emb(x, cos, sin, interleaved, position_ids=ids)
    for b in range(2):
        for s in range(5):
            one = apply_rotary_emb(
                x[b : b + 1, s : s + 1], cos, sin, interleaved, seqlen_offsets=int(ids[b, s])
            )
            assert torch.equal(out[b, s], one[0, 0])
    flat = apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, position_ids=ids.flatten().long())
    assert torch.equal(flat, out.flatten(0, 1))


def test_module_options() -> None:
    q, k = torch.randn(2, 1, 6, 2, 16)
    rotary, ids = RotaryEmbedding(16), torch.tensor([[5, 4, 3, 2, 1, 0]])
    plain = rotary(q, k)
    reversed_ids = rotary(q.flip(1), k, position_ids=ids, max_seqlen=6)
    assert torch.equal(reversed_ids[0].flip(1), plain[0]) and not torch.equal(reversed_ids[1], plain[1])
    boundaries = torch.tensor([0, 6], dtype=torch.int32)
    packed = rotary(q[0], k[0], cu_seqlens=boundaries, max_seqlen=6)
    assert torch.equal(packed[0], plain[0][0])
    qkv = torch.stack([q, k, q], dim=2)
    assert torch.equal(rotary.rotate_packed(qkv), torch.stack([*plain, q], dim=2))
    flat = torch.cat([q, k, k], dim=2)
    assert torch.equal(rotary.rotate_packed(flat, num_heads_q=2), torch.cat([*plain, k], dim=2))
    copies = q.clone(), k.clone()
    assert torch.equal(RotaryEmbedding(16, inplace=True)(*copies)[0], copies[0])
    assert torch.equal(copies[0], plain[0]) and torch.equal(copies[1], plain[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_rotary_emb_qk(X, X[:, :3], COS, COS), r"q and k: got shapes .* \(2, 3, 3, 8\)"),
        (lambda: apply_rotary_emb_qk(X, X[..., :6], COS, COS), r"q and k: got shapes"),
        (lambda: apply_rotary_emb_qk(X, X, COS, COS, COS), r"sin_k: got None; expected a table, as cos_k is"),
        (lambda: apply_rotary_emb_qk(X, X, COS, COS, COS, COS[:3]), r"sin_k: got shape \(3, 4\)"),
        (
            lambda: apply_rotary_emb_qkv_(X, COS, COS),
            r"qkv: got shape \(2, 4, 3, 8\); expected \(B, S, 3, H, D\)",
        ),
        (lambda: apply_rotary_emb_qkv_(QKV.transpose(2, 3), COS, COS), r"qkv: got shape"),
        (
            lambda: apply_rotary_emb_qkv_(torch.ones(2, 4, 3, 4, 8)[:, :, :, :2], COS, COS),
            r"qkv: got strides .*; expected heads of equal distance",
        ),
        (lambda: apply_rotary_emb_qkv_(X, COS, COS, num_heads_q=2), r"num_heads_q: got 2, for qkv of shape"),
        (lambda: apply_rotary_emb_qkv_(X, COS, COS, num_heads_q=4), r"num_heads_q: got 4"),
        (
            lambda: apply_rotary_emb_qkv_(X, COS, COS, num_heads_q=1, cu_seqlens=torch.tensor([0, 4])),
            r"qkv: got shape",
        ),
        (lambda: apply_rotary_emb_kv_(QKV, COS, COS), r"kv: got shape .*; expected \(B, S, 2, H, D\)"),
        (
            lambda: apply_rotary_emb(X, COS, COS, position_ids=torch.zeros(2, 3).long()),
            r"position_ids: got shape \(2, 3\); expected \(2, 4\), one position for each token",
        ),
        (
            lambda: apply_rotary_emb(X, COS, COS, seqlen_offsets=1, position_ids=torch.zeros(2, 4).long()),
            r"position_ids: got position_ids together with seqlen_offsets",
        ),
        (
            lambda: apply_rotary_emb(X, COS, COS, position_ids=torch.full((2, 4), 6)),
            r"position_ids: got tokens at positions up to 6; expected positions below 6",
        ),
        (lambda: apply_rotary_emb(X, COS, COS, position_ids=torch.full((2, 4), -1)), r"position_ids: got -1"),
        (lambda: RotaryEmbedding(8)(X, X, position_ids=torch.zeros(2, 4).long()), r"max_seqlen: got None"),
        (lambda: RotaryEmbedding(8).rotate_packed(QKV, torch.tensor([1, 1])), r"max_seqlen: got None"),
        (lambda: RotaryEmbedding(8).rotate_packed(torch.ones(8)), r"qkv: got shape \(8,\)"),
        (
            lambda: RotaryEmbedding(8).rotate_packed(torch.ones(8), num_heads_q=1),
            r"num_heads_q: got 1, for qkv",
        ),
    ],
)
def test_rejected_calls(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "Fix: " in str(error.value)
    assert torch.equal(QKV, torch.ones_like(QKV)) and torch.equal(X, torch.ones_like(X))
