"""The portable path against the fp64 definition: every option, forward and backward, dense, packed and paged."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from flash_attn_kernels import autograd, blockwise, explain, flash_attn_func, flash_attn_varlen_func
from flash_attn_kernels.inputs import ScoreModifiers
from flash_attn_kernels.options import AttentionOptions, make_options
from flash_attn_kernels.philox import draw_seed_and_offset, keep_mask
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 3)},
    "left window": {"window_size": (5, -1)},
    "causal window": {"causal": True, "window_size": (20, 9)},
    "diagonal": {"window_size": (0, 0)},
    "softcap": {"softcap": 1.5},
    "scale": {"softmax_scale": 0.7},
    "negative scale": {"softmax_scale": -0.4, "causal": True},
    "zero scale": {"softmax_scale": 0.0},
    "softcap causal": {"softcap": 2.0, "causal": True},
    "causal top-left": {"causal": True, "causal_alignment": "top-left"},
    "window top-left": {"window_size": (7, 3), "causal_alignment": "top-left"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in small problems, of sizes that divide nothing."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 13)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 17)


def normalised(head_dim: int, **options: Any) -> AttentionOptions:
    defaults = {
        "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "dropout_p": 0.0,
        "deterministic": False,
    }  # fmt: skip
    return make_options(head_dim=head_dim, **{**defaults, **options})


def inputs(
    seqlen_q: int, seqlen_k: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q * 1009 + seqlen_k * 31 + heads)
    shapes = ((2, seqlen_q, heads, 8), (2, seqlen_k, kv_heads, 8), (2, seqlen_k, kv_heads, 12))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradients(attend, tensors: list[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """out, lse and the gradients of a random functional of both."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*leaves)
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    loss = (out * dout).sum() + (lse.masked_fill(lse.isinf(), 0.0) * dlse).sum()
    result = {"out": out, "lse": lse}
    for i, gradient in enumerate(torch.autograd.grad(loss, leaves, allow_unused=True)):
        result[f"d{i}"] = torch.zeros_like(leaves[i]) if gradient is None else gradient
    return {name: value.detach() for name, value in result.items()}


def assert_equal_to_reference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp64 on both sides: equal up to the order of summation."""
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(1, 1), (31, 31), (40, 23), (23, 40), (1, 50), (50, 1)])
def test_every_option_matches_the_definition(name: str, lengths: tuple[int, int]) -> None:
    tensors, options = inputs(*lengths), OPTIONS[name]
    slopes = torch.rand(4, dtype=torch.float64)

    def reference(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        modifiers = ScoreModifiers(alibi_slopes=slopes.reshape(-1, 4))
        return attention_reference(q, k, v, normalised(8, **options), modifiers=modifiers)[:2]

    def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, alibi_slopes=slopes, return_lse=True, **options)

    assert_equal_to_reference(gradients(ours, [*tensors, slopes]), gradients(reference, [*tensors, slopes]))
    batch_slopes = torch.rand(2, 4, dtype=torch.float64)
    assert_equal_to_reference(
        gradients(ours, [*tensors, batch_slopes]), gradients(reference, [*tensors, batch_slopes])
    )


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "full"])
def test_every_option_changes_the_output(name: str) -> None:
    tensors = inputs(30, 30)
    assert not torch.allclose(flash_attn_func(*tensors, **OPTIONS[name]), flash_attn_func(*tensors))
    slopes = torch.rand(4, dtype=torch.float64)
    assert not torch.allclose(flash_attn_func(*tensors, alibi_slopes=slopes), flash_attn_func(*tensors))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (6, 2), (5, 1), (8, 1), (12, 4)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    tensors = inputs(20, 33, heads, kv_heads)
    options = normalised(8, causal=True)
    assert_equal_to_reference(
        gradients(lambda q, k, v: flash_attn_func(q, k, v, causal=True, return_lse=True), tensors),
        gradients(lambda q, k, v: attention_reference(q, k, v, options)[:2], tensors),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_tolerance_law_in_lower_precision(dtype: torch.dtype, causal: bool) -> None:
    tensors = inputs(65, 65, dtype=dtype)
    options = normalised(8, causal=causal)
    exact = gradients(
        lambda q, k, v: attention_reference(q, k, v, options)[:2], [x.double() for x in tensors]
    )
    plain = gradients(lambda q, k, v: attention_reference(q, k, v, options, compute_dtype=dtype)[:2], tensors)
    ours = gradients(lambda q, k, v: flash_attn_func(q, k, v, causal=causal, return_lse=True), tensors)
    assert ours["out"].dtype == dtype and ours["lse"].dtype == torch.float32
    for name in exact:
        assert_within_reference_error(ours[name], exact[name], plain[name], name=name, factor=2.0, atol=1e-6)


def test_gradcheck_through_out_and_lse() -> None:
    leaves = [x.requires_grad_() for x in inputs(5, 6)] + [
        torch.rand(4, dtype=torch.float64, requires_grad=True)
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, v, slopes: flash_attn_func(
            q, k, v, causal=True, softcap=2.0, alibi_slopes=slopes, return_lse=True
        ),
        leaves,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_forward_mode_derivatives(packed: bool) -> None:
    primals = tuple(inputs(7, 9))
    tangents = tuple(x.sin() for x in primals)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not packed:
            return flash_attn_func(q, k, v, causal=True, softcap=2.0, return_lse=True)
        lengths = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = flash_attn_varlen_func(q, k, v, *lengths, causal=True, softcap=2.0, return_lse=True)
        return out.unflatten(0, (2, 7)), lse.unflatten(1, (2, 7)).transpose(0, 1)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        reference = attention_reference(q, k, v, normalised(8, causal=True, softcap=2.0))
        return reference.out, reference.lse

    expected = torch.func.jvp(definition, primals, tangents)
    torch.testing.assert_close(torch.func.jvp(attend, primals, tangents), expected)


def test_rows_that_see_nothing() -> None:
    tensors = [x.requires_grad_() for x in inputs(30, 10)]
    out, lse = flash_attn_func(*tensors, causal=True, return_lse=True)
    assert (out[:, :20] == 0).all() and (lse[:, :, :20] == float("-inf")).all()
    assert lse[:, :, 20:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), tensors)
    assert (dq[:, :20] == 0).all() and all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_tensors(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    q = torch.randn(batch, seqlen_q, 4, 8, requires_grad=True)
    k, v = (torch.randn(batch, seqlen_k, 2, 8, requires_grad=True) for _ in range(2))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == float("-inf")).all()
    for leaf, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


def test_nan_inside_a_sequence_is_not_hidden() -> None:
    q, k, v = inputs(20, 20)
    q[0, 3, 0, 0] = float("nan")
    out = flash_attn_func(q, k, v)
    assert out[0, 3, 0].isnan().all() and out[0, 4:].isfinite().all() and out[1].isfinite().all()


# Dropout


def dropout_mask(
    seed_and_offset: Tensor, p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    flat_heads = torch.arange(batch * heads).reshape(batch, heads, 1, 1)
    return keep_mask(seed_and_offset, flat_heads, torch.arange(seqlen_q), torch.arange(seqlen_k), p)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_dropout_matches_the_definition_with_its_own_mask(softcap: float) -> None:
    tensors = inputs(40, 29)
    options = normalised(8, causal=True, dropout_p=0.3, softcap=softcap)
    torch.manual_seed(5)
    mask = dropout_mask(draw_seed_and_offset(torch.device("cpu")), 0.3, 2, 4, 40, 29)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return flash_attn_func(q, k, v, dropout_p=0.3, causal=True, softcap=softcap, return_lse=True)

    assert_equal_to_reference(
        gradients(ours, tensors),
        gradients(lambda q, k, v: attention_reference(q, k, v, options, keep_mask=mask)[:2], tensors),
    )


def test_dropout_follows_the_generator_and_not_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(40, 40)
    torch.manual_seed(1)
    first, second = (flash_attn_func(*tensors, dropout_p=0.5) for _ in range(2))
    assert not torch.allclose(first, second)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 512)
    torch.manual_seed(1)
    torch.testing.assert_close(flash_attn_func(*tensors, dropout_p=0.5), first)


def test_checkpoint_recomputes_the_same_dropout() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(20, 20))

    def attend(q: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, dropout_p=0.4)

    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(attend(q).sum(), q)
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], expected)


def test_attention_probabilities_carry_the_dropped_sign() -> None:
    tensors = inputs(33, 21)
    torch.manual_seed(7)
    _, lse, probabilities = flash_attn_func(*tensors, dropout_p=0.25, causal=True, return_attn_probs=True)
    torch.manual_seed(7)
    mask = dropout_mask(draw_seed_and_offset(torch.device("cpu")), 0.25, 2, 4, 33, 21)
    reference = attention_reference(
        *tensors, normalised(8, causal=True, dropout_p=0.25), keep_mask=mask
    ).probabilities
    torch.testing.assert_close(probabilities, torch.where(mask, reference, -reference))
    assert lse.shape == (2, 4, 33)


# Packed sequences


def packed(lengths_q: list[int], lengths_k: list[int], spare: int = 5) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths_q) * 7 + sum(lengths_k))
    totals = [sum(lengths_q) + spare, sum(lengths_k) + spare, sum(lengths_k) + spare]
    tensors = [
        torch.randn(total, heads, dim, generator=generator, dtype=torch.float64)
        for total, heads, dim in zip(totals, (4, 2, 2), (8, 8, 12), strict=True)
    ]
    for x, total in zip(tensors, totals, strict=True):
        x[total - spare :] = float("nan")  # rows that belong to no sequence
    cumulative = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)
    ]
    return tensors, *cumulative


PACKED_LENGTHS = [([3, 0, 40, 1], [5, 7, 0, 1]), ([30], [30]), ([0, 0], [0, 4]), ([17, 20, 5], [17, 3, 60])]


@pytest.mark.parametrize("lengths_q, lengths_k", PACKED_LENGTHS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 2), "softcap": 3.0}], ids=str)
def test_packed_equals_one_sequence_at_a_time(
    lengths_q: list[int], lengths_k: list[int], options: dict
) -> None:
    tensors, cu_q, cu_k = packed(lengths_q, lengths_k)
    slopes = torch.rand(len(lengths_q), 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*tensors, slopes)]
    out, lse = flash_attn_varlen_func(
        *leaves[:3], cu_q, cu_k, alibi_slopes=leaves[3], return_lse=True, **options
    )
    assert (out[cu_q[-1] :] == 0).all() and (lse[:, cu_q[-1] :] == float("-inf")).all()
    dout = torch.randn_like(out)
    dout[cu_q[-1] :] = float("nan")
    all_gradients = torch.autograd.grad(out, leaves, dout)
    for b in range(len(lengths_q)):
        rows_q, rows_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = [
            x.detach()[rows].unsqueeze(0).requires_grad_()
            for x, rows in zip(tensors, (rows_q, rows_k, rows_k), strict=True)
        ]
        slope = slopes.detach()[b].requires_grad_()
        one_out, one_lse = flash_attn_func(*one, alibi_slopes=slope, return_lse=True, **options)
        assert torch.equal(out[rows_q], one_out[0]) and torch.equal(lse[:, rows_q], one_lse[0])
        one_gradients = torch.autograd.grad(one_out, [*one, slope], dout[rows_q].unsqueeze(0))
        for got, expected, rows in zip(
            all_gradients[:3], one_gradients[:3], (rows_q, rows_k, rows_k), strict=True
        ):
            torch.testing.assert_close(got[rows], expected[0])
        torch.testing.assert_close(all_gradients[3][b], one_gradients[3])
    for gradient, end in zip(all_gradients[:3], (cu_q[-1], cu_k[-1], cu_k[-1]), strict=True):
        assert (gradient[end:] == 0).all()


def test_max_seqlen_never_changes_results() -> None:
    tensors, cu_q, cu_k = packed([9, 20], [9, 20])
    expected = flash_attn_varlen_func(*tensors, cu_q, cu_k, causal=True)
    for hint in (1, 20, 4096):
        assert torch.equal(flash_attn_varlen_func(*tensors, cu_q, cu_k, hint, hint, causal=True), expected)


def test_packed_dropout_is_keyed_on_the_sequence() -> None:
    tensors, cu_q, cu_k = packed([16, 16], [16, 16], spare=0)
    torch.manual_seed(2)
    out = flash_attn_varlen_func(*tensors, cu_q, cu_k, dropout_p=0.5)
    torch.manual_seed(2)
    dense = flash_attn_func(*(x.reshape(2, 16, *x.shape[1:]) for x in tensors), dropout_p=0.5)
    torch.testing.assert_close(out, dense.flatten(0, 1))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_paged_equals_packed(page_size: int) -> None:
    lengths_q, lengths_k = [4, 0, 9], [20, 5, 0]
    (q, k, v), cu_q, cu_k = packed(lengths_q, lengths_k, spare=0)
    pages_per_sequence = 20 // page_size + 1
    tokens = [(sequence, t) for sequence, length in enumerate(lengths_k) for t in range(length)]
    table = torch.randperm(3 * pages_per_sequence).reshape(3, -1).to(torch.int32)
    pages = []
    for x in (k, v):
        paged = torch.full((3 * pages_per_sequence, page_size, *x.shape[1:]), float("nan"), dtype=x.dtype)
        for b, t in tokens:
            paged[table[b, t // page_size], t % page_size] = x[cu_k[b] + t]
        pages.append(paged)
    leaves, paged_leaves = ([x.detach().requires_grad_() for x in (q, *kv)] for kv in ((k, v), pages))
    expected = flash_attn_varlen_func(*leaves, cu_q, cu_k, causal=True)
    out = flash_attn_varlen_func(*paged_leaves, cu_q, cu_k, causal=True, block_table=table)
    assert torch.equal(out, expected)
    dq, dk, _ = torch.autograd.grad(out.sum(), paged_leaves)
    expected_dq, expected_dk, _ = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(dq, expected_dq)
    for b, t in tokens:
        torch.testing.assert_close(dk[table[b, t // page_size], t % page_size], expected_dk[cu_k[b] + t])


# Strides, precision contexts, memory


def test_any_strides() -> None:
    q, k, v = inputs(20, 20)
    expected = gradients(lambda *t: flash_attn_func(*t, causal=True, return_lse=True), [q, k, v])
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    strided.append(torch.stack([v, v], dim=-1)[..., 0])
    assert all(not x.is_contiguous() for x in strided)
    actual = gradients(lambda *t: flash_attn_func(*t, causal=True, return_lse=True), strided)
    assert_equal_to_reference(actual, expected)


def test_autocast_runs_in_the_autocast_dtype() -> None:
    tensors = inputs(10, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_func(*tensors).dtype == torch.bfloat16
    assert flash_attn_func(*tensors).dtype == torch.float32


@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 2048), (1, 1, 2048, 1), (1, 1, 1, 1)], ids=str)
def test_memory_is_linear_in_sequence_length(
    bias_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor of a long call is a block of scores, not the whole matrix; nor is the gradient of a bias."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 64)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 64)
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    q, k, v = (torch.randn(1, 2048, 1, 4, requires_grad=True) for _ in range(3))
    bias = None if bias_shape is None else torch.randn(bias_shape, requires_grad=True)
    with LargestTensor():
        flash_attn_func(q, k, v, causal=True, attn_bias=bias).sum().backward()
    assert largest == q.numel() * 4, "no tensor should be larger than q itself"


def test_compiles_without_graph_breaks() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(20, 20, dtype=torch.float32))
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True), fullgraph=True, backend="aot_eager"
    )
    out = compiled(q, k, v)
    expected = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b)


PACKED_TENSORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout_p": 0.3, "causal": True},
    "used": {
        "seqused_q": torch.tensor([3, 0, 8], dtype=torch.int32),
        "seqused_k": torch.tensor([7, 2, 0], dtype=torch.int32),
        "window_size": (3, 1),
        "causal_alignment": "top-left",
    },
    "modifiers": {
        "attn_bias": torch.linspace(-1.0, 1.0, 9 * 14).reshape(1, 1, 9, 14).repeat(3, 4, 1, 1),
        "alibi_slopes": torch.linspace(0.1, 0.4, 4),
        "learnable_sink": torch.linspace(0.0, 1.0, 4),
        "key_padding_mask": torch.arange(14) % 5 < torch.tensor([[5], [3], [4]]),
        "softcap": 2.0,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PACKED_TENSORS)
def test_packed_calls_compile_without_graph_breaks(name: str, dtype: torch.dtype) -> None:
    """Lengths are read on the host, but inside an operator: one graph for all of them."""
    torch._dynamo.reset()
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in inputs(9, 14, dtype=dtype))
    leaves = {
        key: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in PACKED_TENSORS[name].items()
    }
    wanted = [x for x in (q, k, v, *leaves.values()) if isinstance(x, Tensor) and x.requires_grad]

    def attend(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, **leaves, return_lse=True)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=graphs)
    for ends_q, ends_k in (((0, 5, 5, 14), (0, 9, 12, 21)), ((0, 9, 10, 18), (0, 14, 24, 28))):
        lengths = [torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k)]
        if name == "used" and ends_q[1] == 5:
            lengths = [torch.tensor((0, 4, 5, 14), dtype=torch.int32), lengths[1]]
        results = []
        for function in (compiled, attend):
            torch.manual_seed(0)
            out, lse = function(*lengths)
            loss = out.square().sum() + lse.exp().sum()
            results.append((out, lse, *torch.autograd.grad(loss, wanted)))
            with torch.no_grad():
                torch.manual_seed(0)
                results.append(function(*lengths))
        torch.testing.assert_close(results[0], results[2], rtol=0.0, atol=0.0)
        torch.testing.assert_close(results[1], results[3], rtol=0.0, atol=0.0)
    assert graphs.frame_count == 2  # with gradients, and without


def test_packed_calls_are_exported() -> None:
    q, k, v = (x.flatten(0, 1) for x in inputs(9, 14, dtype=torch.float32))

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True)

    lengths = [
        [torch.tensor(x, dtype=torch.int32) for x in pair] for pair in (((0, 18), (0, 28)), ((0, 5), (0, 9)))
    ]
    exported = torch.export.export(Attend(), (q, k, v, *lengths[0])).module()
    for pair in lengths:
        expected = Attend()(q, k, v, *pair)
        assert torch.equal(exported(q, k, v, *pair), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which the program was not exported for
            assert torch.equal(exported(q, k, v, *pair), expected)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_packed_calls_of_tensors_without_values(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        q, k, v = torch.empty(10, 4, 8), torch.empty(14, 2, 8), torch.empty(14, 2, 12, requires_grad=True)
        lengths = torch.empty(3, dtype=torch.int32)
        out, lse = flash_attn_varlen_func(q, k, v, lengths, lengths, return_lse=True)
        assert out.shape == (10, 4, 12) and lse.shape == (4, 10)
        assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape


def test_probabilities_compile_without_graph_breaks() -> None:
    tensors = inputs(20, 20, dtype=torch.float32)
    attend = functools.partial(flash_attn_func, causal=True, return_attn_probs=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))


@pytest.mark.parametrize("name", PACKED_TENSORS)
def test_opcheck_of_packed_calls(name: str) -> None:
    leaves = {
        key: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in PACKED_TENSORS[name].items()
    }
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "flash_attn_kernels":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    q, k, v = (x.flatten(0, 1).requires_grad_() for x in inputs(9, 14, dtype=torch.float32))
    lengths = [torch.tensor(x, dtype=torch.int32) for x in ((0, 4, 5, 14), (0, 9, 12, 21))]
    with pytest.MonkeyPatch.context() as patch, Calls():
        patch.setattr(autograd, "is_compiling", lambda: True)
        flash_attn_varlen_func(q, k, v, *lengths, **leaves).square().sum().backward()
    assert len(calls) == 2
    for operator, arguments in calls:
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        torch.library.opcheck(operator, arguments)


def test_explain_on_the_cpu() -> None:
    explanation = explain(*inputs(3, 3))
    assert explanation.path == "portable" and "tensors are on cpu" in str(explanation)
    with pytest.raises(ValueError, match=r"strict: .*tensors are on cpu.*strict=False"):
        flash_attn_func(*inputs(3, 3), strict=True)
