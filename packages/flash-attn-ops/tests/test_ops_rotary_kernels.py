"""The rotary kernel against float64 rotations, with plain torch in the same dtype as the measure of error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.dispatch import explain
from flash_attn_ops.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qk,
    apply_rotary_emb_qkv_,
    checks,
)
from torch import Tensor

pytestmark = pytest.mark.gpu

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@dataclass(frozen=True)
class Case:
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    dtype: torch.dtype = BF16
    table_dtype: torch.dtype = FP32
    offsets: str = "zero"  # zero, int, tensor
    lengths: tuple[int, ...] | None = (
        None  # packed sequences of these lengths, with a token outside at each end
    )


SMALL = [
    Case(2, 5, 3, 64, 64),
    Case(2, 5, 3, 64, 64, interleaved=True, offsets="int"),
    Case(3, 7, 5, 40, 24, offsets="tensor", dtype=FP32),
    Case(3, 7, 5, 40, 24, interleaved=True, offsets="tensor"),
    Case(1, 1, 2, 6, 2, dtype=FP32, offsets="int"),
    Case(1, 33, 40, 20, 20, table_dtype=BF16),
    Case(4, 0, 2, 32, 32, lengths=(5, 0, 1, 9), offsets="tensor"),
    Case(4, 0, 2, 32, 12, lengths=(5, 0, 1, 9), interleaved=True, dtype=FP32),
    Case(1, 0, 1, 16, 16, lengths=(3,), offsets="int"),
    Case(3, 0, 2, 16, 16, lengths=(0, 0, 2)),
]
LARGE = [
    Case(2, 1021, 32, 128, 128),
    Case(2, 1021, 33, 128, 64, interleaved=True),
    Case(3, 517, 8, 96, 96, offsets="tensor"),
    Case(2, 300, 4, 576, 512, dtype=FP32),
    Case(64, 0, 16, 64, 64, lengths=tuple(range(0, 640, 10)), offsets="int"),
]


@dataclass
class Given:
    x: Tensor
    cos: Tensor
    sin: Tensor
    positions: list[list[int | None]]  # of every token, by batch entry; None is outside every sequence
    options: dict


def given_for(case: Case, device: str) -> Given:
    offsets = {
        "zero": [0] * case.batch,
        "int": [3] * case.batch,
        "tensor": [(5 * b) % 11 for b in range(case.batch)],
    }
    starts = offsets[case.offsets]
    options: dict = {"interleaved": case.interleaved, "seqlen_offsets": starts[0]}
    if case.offsets == "tensor":
        options["seqlen_offsets"] = torch.tensor(starts, dtype=torch.int32, device=device)
    if case.lengths is None:
        shape = (case.batch, case.seqlen, case.heads, case.head_dim)
        positions = [[start + i for i in range(case.seqlen)] for start in starts]
    else:
        boundaries = torch.tensor([0, *case.lengths]).cumsum(0) + 1
        options["cu_seqlens"] = boundaries.to(device=device, dtype=torch.int32)
        shape = (sum(case.lengths) + 2, case.heads, case.head_dim)
        packed = [
            start + i for start, length in zip(starts, case.lengths, strict=True) for i in range(length)
        ]
        positions = [[None, *packed, None]]
    rows = 1 + max((p for row in positions for p in row if p is not None), default=0)
    angle = torch.rand(rows, case.rotary_dim // 2, device=device) * 6.3
    cos, sin = angle.cos().to(case.table_dtype), angle.sin().to(case.table_dtype)
    return Given(torch.randn(shape, device=device).to(case.dtype), cos, sin, positions, options)


def plain(case: Case, given: Given, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each pair as a 2 x 2 matrix times a vector, in ``dtype``."""
    outside = len(given.cos)  # the row behind the table: the identity
    row = torch.tensor(
        [[outside if p is None else p for p in row] for row in given.positions], device=x.device
    )
    cos = torch.cat([given.cos, torch.ones_like(given.cos[:1])]).to(dtype)[row][:, :, None]
    sin = torch.cat([given.sin, torch.zeros_like(given.sin[:1])]).to(dtype)[row][:, :, None]
    batched = x.to(dtype).reshape(len(given.positions), -1, case.heads, case.head_dim)
    half = case.rotary_dim // 2
    index = torch.arange(half, device=x.device)
    first_index, second_index = (2 * index, 2 * index + 1) if case.interleaved else (index, index + half)
    first, second = batched[..., first_index], batched[..., second_index]
    out = batched.clone()
    out[..., first_index] = first * cos - second * sin
    out[..., second_index] = first * sin + second * cos
    return out.reshape(x.shape)


def check(case: Case, device: str) -> None:
    given = given_for(case, device)
    assert explain(given.x, given.cos, given.sin).path == "triton"
    results = {}
    upstream = torch.randn_like(given.x)
    for name, dtype in (("ours", None), ("exact", torch.float64), ("same", case.dtype)):
        leaf = given.x.clone().requires_grad_() if dtype is None else given.x.to(dtype).requires_grad_()
        if dtype is None:
            out = apply_rotary_emb(leaf, given.cos, given.sin, **given.options)
        else:
            out = plain(case, given, leaf, dtype)
        out.backward(upstream.to(out.dtype))
        results[name] = {"out": out, "dx": leaf.grad}
    for name in ("out", "dx"):
        ours, exact, same = (results[which][name] for which in ("ours", "exact", "same"))
        assert_within_reference_error(ours, exact, same, name=name)
        assert ours.dtype == case.dtype

    changed = given.x.clone()
    returned = apply_rotary_emb(changed, given.cos, given.sin, inplace=True, **given.options)
    assert returned is changed and torch.equal(changed, results["ours"]["out"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


def test_strided_inputs_and_gradients(device: str) -> None:
    """Slices of packed qkv, transposed and expanded tensors: same results as for contiguous copies."""
    cos, sin = torch.randn(2, 9, 8, device=device)
    variants = {
        "slice of qkv": torch.randn(2, 6, 3, 4, 16, device=device)[:, :, 1],
        "heads first": torch.randn(2, 4, 6, 16, device=device).transpose(1, 2),
        "head dim first": torch.randn(2, 6, 16, 4, device=device).transpose(2, 3),
        "expanded": torch.randn(1, 6, 1, 16, device=device).expand(2, 6, 4, 16),
    }
    for name, x in variants.items():
        leaf, copy = x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()
        out, expected = (apply_rotary_emb(tensor, cos, sin) for tensor in (leaf, copy))
        assert out.is_contiguous() and torch.equal(out, expected), name
        out.sum().backward()
        expected.backward(torch.ones_like(expected))
        assert torch.equal(leaf.grad, copy.grad), name


def test_in_place_writes_only_the_slice(device: str) -> None:
    cos, sin = torch.randn(2, 6, 8, device=device)
    qkv = torch.randn(2, 6, 3, 4, 16, device=device)
    before = qkv.clone()
    apply_rotary_emb(qkv[:, :, 1], cos, sin, inplace=True)
    assert torch.equal(qkv[:, :, 1], apply_rotary_emb(before[:, :, 1], cos, sin))
    assert torch.equal(qkv[:, :, 0], before[:, :, 0]) and torch.equal(qkv[:, :, 2], before[:, :, 2])


def test_in_place_under_autograd(device: str) -> None:
    cos, sin = torch.randn(2, 6, 8, device=device)
    leaf = torch.randn(2, 6, 4, 16, device=device, requires_grad=True)
    hidden = leaf * 2
    out = apply_rotary_emb(hidden, cos, sin, inplace=True)
    assert out is hidden
    upstream = torch.randn_like(out)
    kept = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, kept), "the incoming gradient belongs to the caller"
    copy = leaf.detach().clone().requires_grad_()
    apply_rotary_emb(copy * 2, cos, sin).backward(upstream)
    assert torch.equal(leaf.grad, copy.grad)


def test_in_place_without_grad_is_seen_by_autograd(device: str) -> None:
    """A graph that saved x finds out that x changed."""
    cos, sin = torch.randn(2, 6, 8, device=device)
    x = torch.randn(2, 6, 4, 16, device=device)
    weight = torch.ones_like(x, requires_grad=True)
    loss = (weight * x).sum()
    apply_rotary_emb(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_positions_beyond_the_table_are_nan_on_the_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_positions", lambda *_: None)  # what a GPU's host cannot know
    x = torch.ones(3, 4, 2, 16, device=device)
    cos, sin = torch.ones(2, 6, 8, device=device)
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 4, -1], device=device))
    wrong = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool, device=device)
    assert torch.equal(out.isnan().all(-1).all(-1), wrong) and torch.equal(out.isnan().any(-1).any(-1), wrong)


@pytest.mark.parametrize("pair", [False, True])
def test_differentiable_again(pair: bool, device: str) -> None:
    """As away from the kernels: a rotation is linear, so that its gradient has one of its own."""
    q, k = (torch.randn(1, 3, heads, 8, device=device) for heads in (2, 1))
    cos, sin = torch.randn(2, 3, 4, device=device)
    results = []
    for dtype in (FP32, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (q, k)]
        if pair:
            rotated = apply_rotary_emb_qk(*leaves, cos, sin)
        else:
            rotated = [apply_rotary_emb(leaf, cos, sin) for leaf in leaves]
        gradients = torch.autograd.grad(sum(out.pow(3).sum() for out in rotated), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(one.square().sum() for one in gradients), leaves))
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact.to(FP32), rtol=1e-4, atol=1e-3)


def test_module_decodes_as_it_prefills(device: str) -> None:
    rotary = RotaryEmbedding(16)
    q, k = torch.randn(2, 1, 9, 3, 32, device=device).to(BF16)
    whole_q, whole_k = rotary(q, k)
    for i in range(9):
        one_q, one_k = rotary(
            q[:, i : i + 1], k[:, i : i + 1], torch.tensor([i], device=device), max_seqlen=9
        )
        assert torch.equal(one_q, whole_q[:, i : i + 1]) and torch.equal(one_k, whole_k[:, i : i + 1])


def test_same_bits_twice() -> None:
    given = given_for(LARGE[0], "cuda")
    first, second = (apply_rotary_emb(given.x, given.cos, given.sin) for _ in range(2))
    assert torch.equal(first, second)


def test_more_than_2_to_the_31_elements() -> None:
    """The last tokens come out as they do alone."""
    tokens, heads, head_dim = 2**31 // 4096 + 19, 32, 128
    x = torch.randn(tokens, heads, head_dim, device="cuda", dtype=BF16)
    cos, sin = torch.randn(2, tokens, head_dim // 2, device="cuda")
    boundaries = torch.tensor([0, tokens], device="cuda")
    out = apply_rotary_emb(x, cos, sin, cu_seqlens=boundaries, max_seqlen=tokens)
    tail = apply_rotary_emb(x[-30:], cos[-30:], sin[-30:], cu_seqlens=torch.tensor([0, 30], device="cuda"))
    assert torch.equal(out[-30:], tail)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset_type", [int, Tensor], ids=lambda offset_type: offset_type.__name__)
def test_compiles_to_one_graph(offset_type: type, inplace: bool, device: str) -> None:
    cos, sin = RotaryEmbedding(64).tables(128, torch.device(device))

    def block(q: Tensor, k: Tensor, offset: int | Tensor) -> Tensor:
        q = apply_rotary_emb(q * 2, cos, sin, inplace=inplace, seqlen_offsets=offset)
        k = apply_rotary_emb(k, cos[:, :8], sin[:, :8], interleaved=True, seqlen_offsets=offset)
        return q * k

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (7, 40):
        leaves = [torch.randn(2, seqlen, 3, 64, device=device, requires_grad=True) for _ in range(2)]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        offset = seqlen + 3
        if offset_type is Tensor:
            offset = torch.tensor([offset, 5], device=device)
        out, expected = compiled(*leaves, offset), block(*copies, offset)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves, offset), expected)


def test_module_compiles_to_one_graph(device: str) -> None:
    """The table is made while tracing."""
    rotary = RotaryEmbedding(64)

    def block(q: Tensor, k: Tensor) -> Tensor:
        q, k = rotary(q * 2, k)
        return q * k

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (7, 40):
        leaves = [torch.randn(2, seqlen, 3, 64, device=device, requires_grad=True) for _ in range(2)]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        compiled(*leaves).sum().backward()
        block(*copies).sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)


def test_compiled_in_place_overwrites_the_input(device: str) -> None:
    cos, sin = RotaryEmbedding(16).tables(9, torch.device(device))

    def rotate_in_place(x: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos, sin, inplace=True)

    x = torch.randn(2, 9, 3, 16, device=device)
    expected = apply_rotary_emb(x, cos, sin)
    torch.compile(rotate_in_place, fullgraph=True, dynamic=True, backend="aot_eager")(x)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["rotate_heads", "rotate_heads_", "rotate_pair", "rotate_pair_"])
def test_operators_keep_their_word(name: str, packed: bool, device: str) -> None:
    """Schema and fake describe what the launchers do; x is strided."""
    cos, sin = RotaryEmbedding(16).tables(9, torch.device(device))
    x = torch.randn(9, 2, 3, 40, device=device).transpose(0, 1)[..., :24]
    offsets, cu_seqlens = torch.zeros(2, dtype=torch.int32, device=device), None
    if packed:
        x, offsets, cu_seqlens = x[0], None, torch.tensor([0, 5, 9], device=device)
    operator = getattr(torch.ops.flash_attn_ops, name).default
    first = (x, x.clone()) if "pair" in name else (x, 1, 1)
    tables = (cos, sin, cos, sin)
    torch.library.opcheck(operator, (*first, *tables, offsets, 0, cu_seqlens, None, False, False))


def pair_in_float64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of x (B, S, H, D), D = R, as plain torch has them."""
    cos, sin = (table.double()[: x.shape[1], None] for table in (cos, sin))
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("heads", [(3, 1), (4, 4), (33, 8)], ids=str)
def test_queries_and_keys_in_one_launch(heads: tuple[int, int], inplace: bool, device: str) -> None:
    """Own heads, strides, dtypes and tables; the same bits as one by one, forward and backward."""
    cos, sin, cos_k, sin_k = torch.randn(4, 6, 16, device=device)
    leaves = [torch.randn(2, 5, h, 32, device=device).to(d) for h, d in zip(heads, (BF16, FP32), strict=True)]
    leaves[1] = torch.cat([leaves[1]] * 2, dim=-1)[..., :32]  # rows with a gap
    results = []
    for together in (True, False):
        q, k = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        given = (q * 1, k * 1)
        if together:
            out = apply_rotary_emb_qk(*given, cos, sin, cos_k, sin_k, inplace=inplace, seqlen_offsets=1)
            assert (out[0] is given[0]) == inplace and (out[1] is given[1]) == inplace
        else:
            out = (
                apply_rotary_emb(given[0], cos, sin, seqlen_offsets=1),
                apply_rotary_emb(given[1], cos_k, sin_k, seqlen_offsets=1),
            )
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])
        results.append([*out, q.grad, k.grad])
    for together, apart in zip(*results, strict=True):
        assert torch.equal(together, apart)
    exact = pair_in_float64(leaves[1], cos_k[1:], sin_k[1:])
    assert_within_reference_error(results[0][1], exact, exact.float())


def test_one_launch_counts_as_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn_ops.rotary import triton_kernels

    launches = []
    launch = triton_kernels.rotate
    monkeypatch.setattr(
        triton_kernels, "rotate", lambda *args: (launches.append(len(args[0])), launch(*args))[1]
    )
    q, k = torch.randn(2, 1, 4, 2, 16, device=device, requires_grad=True)
    torch.autograd.backward(RotaryEmbedding(16)(q, k), [q.detach(), k.detach()])
    qkv = torch.randn(1, 4, 3, 2, 16, device=device)
    apply_rotary_emb_qkv_(qkv, *RotaryEmbedding(16).tables(4, torch.device(device)))
    assert launches == [2, 2, 1]


@pytest.mark.parametrize("layout", ["dense", "cu_seqlens", "position_ids", "flat position_ids"])
@pytest.mark.parametrize("num_heads_q", [None, 5])
@pytest.mark.parametrize("own_key_tables", [False, True])
def test_packed_projections(layout: str, num_heads_q: int | None, own_key_tables: bool, device: str) -> None:
    """In place, the values untouched, and equal to its parts by themselves; backward likewise."""
    tables = torch.randn(4, 12, 8, device=device)
    tables = tuple(tables) if own_key_tables else (*tables[:2], None, None)
    options: dict = {"seqlen_offsets": torch.tensor([1, 3], device=device)}
    tokens: tuple[int, ...] = (2, 6)
    if layout == "cu_seqlens":
        options["cu_seqlens"], tokens = torch.tensor([0, 4, 9], device=device), (10,)
    if "position_ids" in layout:
        tokens = (10,) if layout.startswith("flat") else (2, 6)
        options = {"position_ids": torch.randint(0, 12, tokens, device=device)}
    heads = (3, 2) if num_heads_q is None else (num_heads_q + 4,)
    leaf = torch.randn(*tokens, *heads, 24, device=device).to(BF16).requires_grad_()
    hidden = leaf * 1
    out = apply_rotary_emb_qkv_(hidden, *tables, num_heads_q=num_heads_q, **options)
    assert out is hidden
    if num_heads_q is None:
        q, k, v = leaf.unbind(-3)
    else:
        q, k, v = leaf.split([5, 2, 2], dim=-2)
    key_tables = tables[2:] if own_key_tables else tables[:2]
    parts = [apply_rotary_emb(q, *tables[:2], **options), apply_rotary_emb(k, *key_tables, **options), v]
    expected = torch.stack(parts, dim=-3) if num_heads_q is None else torch.cat(parts, dim=-2)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    (d_ours,) = torch.autograd.grad(out, leaf, upstream)
    (d_parts,) = torch.autograd.grad(expected, leaf, upstream)
    assert torch.equal(d_ours, d_parts)


def test_packed_keys_and_values(device: str) -> None:
    cos, sin = torch.randn(2, 6, 8, device=device)
    kv = torch.randn(2, 6, 2, 3, 16, device=device)
    before = kv.clone()
    assert apply_rotary_emb_kv_(kv, cos, sin) is kv
    assert torch.equal(kv[:, :, 0], apply_rotary_emb(before[:, :, 0], cos, sin))
    assert torch.equal(kv[:, :, 1], before[:, :, 1])


def test_views_that_require_grad_in_place(device: str) -> None:
    """Autograd has to be told about each view by itself."""
    rotary = RotaryEmbedding(16, inplace=True)
    results = []
    for given in (rotary, RotaryEmbedding(16)):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 96, device=device, requires_grad=True)
        q, k = (x * scale for scale in (1, 2))
        q, k = given(q.view(2, 5, 6, 16), k.view(2, 5, 6, 16))
        (q.sin() + k.cos()).sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_pair_compiles_to_one_graph(device: str) -> None:
    rotary = RotaryEmbedding(64, scale_base=512.0)

    def block(q: Tensor, k: Tensor, qkv: Tensor) -> Tensor:
        q, k = rotary(q * 2, k)
        packed = rotary.rotate_packed(qkv * 2)
        return q * k + packed.sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (7, 40):
        shapes = [(2, seqlen, 3, 64), (2, seqlen, 3, 64), (2, seqlen, 3, 2, 64)]
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        compiled(*leaves).sum().backward()
        block(*copies).sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-3, atol=1e-3)
