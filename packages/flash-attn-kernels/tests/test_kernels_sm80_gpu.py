"""The sm80 CUDA path on a GPU: the tolerance law, odd shapes, grouped heads, windows, strides, repeatability."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from flash_attn_kernels import explain, flash_attn_func
from flash_attn_kernels.options import make_options
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor

pytestmark = pytest.mark.gpu

LENGTHS = [(1, 1), (63, 63), (127, 127), (129, 129), (1000, 1000), (64, 64), (128, 128), (256, 256)]
UNEQUAL_LENGTHS = [(1, 127), (127, 1), (63, 1000), (1000, 63), (129, 320), (320, 129)]


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def random_inputs(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seqlen_q * 7919 + seqlen_k * 31 + heads)
    shapes = ((batch, seqlen_q, heads), (batch, seqlen_k, kv_heads), (batch, seqlen_k, kv_heads))
    q, k, v = (torch.randn(*s, head_dim, device="cuda", dtype=dtype, generator=generator) for s in shapes)
    return q, k, v


def differentiate(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    finite_lse = lse.masked_fill(lse.isinf(), 0.0)
    loss = (out * dout.to(out.dtype)).sum() + (finite_lse * dlse.to(lse.dtype)).sum()
    return Results(out, lse, *torch.autograd.grad(loss, (q, k, v)))


def check(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Outputs, LSE and gradients (through both) against fp64, within the error of plain PyTorch in 16 bits."""
    assert explain(q, k, v, **options).path == "sm80"
    normalised = make_options(
        head_dim=q.shape[-1],
        softmax_scale=options.get("softmax_scale"),
        causal=options.get("causal", False),
        window_size=options.get("window_size", (-1, -1)),
        softcap=0.0,
        dropout_p=0.0,
        deterministic=options.get("deterministic", False),
    )
    dout = torch.randn_like(q)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device="cuda")

    def reference(dtype: torch.dtype):
        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            result = attention_reference(q, k, v, normalised, compute_dtype=dtype)
            return result.out, result.lse

        return attend

    exact = differentiate(
        reference(torch.float64), *(x.double() for x in (q, k, v)), dout.double(), dlse.double()
    )
    plain = differentiate(reference(q.dtype), q, k, v, dout, dlse)
    ours = differentiate(
        lambda q, k, v: flash_attn_func(q, k, v, return_lse=True, **options), q, k, v, dout, dlse
    )
    for name in Results._fields:
        factor, atol = (2.0, 1e-5) if name in ("out", "lse") else (3.0, 1e-4)
        assert_within_reference_error(
            getattr(ours, name),
            getattr(exact, name),
            getattr(plain, name),
            factor=factor,
            atol=atol,
            name=name,
        )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    for seqlen_q, seqlen_k in LENGTHS + UNEQUAL_LENGTHS:
        check(*random_inputs(2, seqlen_q, seqlen_k, 4, 4, head_dim, dtype), causal=causal)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (8, 1), (16, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    for causal, deterministic in itertools.product([False, True], repeat=2):
        inputs = random_inputs(2, 200, 333, heads, kv_heads, head_dim, torch.bfloat16)
        check(*inputs, causal=causal, deterministic=deterministic)


@pytest.mark.parametrize("window_size", [(0, 0), (17, 5), (100, -1), (-1, 70), (300, 0), (2000, 2000)])
def test_windows(window_size: tuple[int, int]) -> None:
    for (seqlen_q, seqlen_k), head_dim in itertools.product([(513, 513), (129, 700), (700, 129)], [64, 128]):
        inputs = random_inputs(1, seqlen_q, seqlen_k, 2, 2, head_dim, torch.bfloat16)
        check(*inputs, window_size=window_size)
        check(*inputs, window_size=window_size, deterministic=True)


def test_softmax_scale_changes_the_output() -> None:
    inputs = random_inputs(2, 100, 100, 2, 2, 64, torch.float16)
    check(*inputs, softmax_scale=0.5)
    assert not torch.equal(flash_attn_func(*inputs, softmax_scale=0.5), flash_attn_func(*inputs))


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 300, 100, 2, 2, 128, torch.bfloat16))
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (out[:, :200] == 0).all() and (lse[:, :, :200] == float("-inf")).all()
    (dq,) = torch.autograd.grad(out.float().sum(), q)
    assert (dq[:, :200] == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(2, seqlen_q, seqlen_k, 2, 2, 64, torch.float16))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_twice(head_dim: int) -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(2, 1000, 777, 8, 2, head_dim, torch.bfloat16))
    dout = torch.randn_like(q)
    first = None
    for _ in range(20):
        out, lse = flash_attn_func(q, k, v, causal=True, deterministic=True, return_lse=True)
        results = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
        if first is not None:
            assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
        first = results


def test_torch_deterministic_algorithms_is_obeyed() -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 2000, 2000, 8, 8, 64, torch.float16))
    dout = torch.randn_like(q)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(flash_attn_func(q, k, v), q, dout)[0] for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])


def test_strided_inputs_and_gradients_equal_contiguous_ones() -> None:
    q, k, v = random_inputs(2, 150, 150, 4, 4, 64, torch.bfloat16)
    dout = torch.randn_like(q)

    def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(*leaves, causal=True, deterministic=True)
        return (out, *torch.autograd.grad(out, leaves, dout))

    expected = gradients(q, k, v, dout)
    packed = torch.stack([q, k, v], dim=2)  # (B, S, 3, H, D)
    transposed = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(gradients(*packed.unbind(2), transposed), expected, strict=True):
        assert torch.equal(a, b)
    odd = torch.randn(2, 150, 4, 65, device="cuda", dtype=torch.bfloat16)[..., 1:]
    odd.copy_(q)
    for a, b in zip(gradients(odd, k, v, dout), expected, strict=True):
        assert torch.equal(a, b)
    leaf = q.detach().requires_grad_()
    flash_attn_func(leaf, k, v).sum().backward()  # an expanded gradient with stride 0
    ones = torch.autograd.grad(flash_attn_func(leaf, k, v), leaf, torch.ones_like(q))[0]
    assert_within_reference_error(leaf.grad, ones, ones, atol=1e-2)


def test_memory_around_the_tensors_changes_nothing() -> None:
    """Rows before and after the tensors hold NaN: they must never be read into a result."""
    q, k, v = random_inputs(1, 100, 90, 2, 2, 128, torch.bfloat16)

    def surrounded(x: Tensor) -> Tensor:
        poisoned = torch.full(
            (x.shape[0], x.shape[1] + 256, *x.shape[2:]), float("nan"), device="cuda", dtype=x.dtype
        )
        inner = poisoned[:, 128:-128]
        inner.copy_(x)
        return inner

    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(*(surrounded(x) for x in (q, k, v)), causal=True), expected)
    gradients = []
    for tensors in ((q, k, v), tuple(surrounded(x) for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = flash_attn_func(*leaves, causal=True, deterministic=True)
        gradients.append(torch.autograd.grad(out, leaves, surrounded(torch.ones_like(q))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_large_logits_stay_finite() -> None:
    q, k, v = random_inputs(1, 300, 300, 2, 2, 64, torch.bfloat16)
    out, lse = flash_attn_func(q * 100, k * 100, v, causal=True, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    check(q * 10, k * 10, v, causal=True)


def test_offsets_beyond_two_to_the_31() -> None:
    seqlen, heads = 70_000, 260  # 70,000 * 260 * 128 > 2^31 elements in q
    q = torch.randn(1, seqlen, heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 64, heads, 128, device="cuda", dtype=torch.bfloat16)
    out = flash_attn_func(q, k, v)
    last = flash_attn_func(q[:, -64:].contiguous(), k, v)
    assert torch.equal(out[:, -64:], last)


def test_more_than_65535_batches() -> None:
    q, k, v = random_inputs(65_600, 4, 4, 1, 1, 64, torch.float16)
    out = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out[-3:], flash_attn_func(q[-3:], k[-3:], v[-3:], causal=True))


def test_side_stream_and_graph_replay() -> None:
    q, k, v = random_inputs(2, 200, 200, 4, 2, 64, torch.bfloat16)
    expected = flash_attn_func(q, k, v, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_side_stream = flash_attn_func(q, k, v, causal=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_side_stream, expected)
    static_q = torch.zeros_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(static_q, k, v, causal=True)
    static_q.copy_(q)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_operators_pass_torch_checks(causal: bool) -> None:
    """Schemas, fakes and tracing with symbolic sizes, as torch.library.opcheck defines them."""
    q, k, v = random_inputs(2, 33, 70, 4, 2, 64, torch.bfloat16)
    operators = torch.ops.flash_attn_kernels
    scale_and_window = (0.125, -1, 0 if causal else -1)
    out, lse = operators.sm80_forward(q, k, v, *scale_and_window)
    torch.library.opcheck(operators.sm80_forward.default, (q, k, v, *scale_and_window))
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), q, k, v, out, lse, dlse, *scale_and_window, True)
        torch.library.opcheck(operators.sm80_backward.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    q, k, v = (x.requires_grad_() for x in random_inputs(2, 128, 128, 4, 2, 64, torch.bfloat16))
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, causal=True), fullgraph=True)
    out = compiled(q, k, v)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def test_portable_path_on_the_gpu_agrees_and_warns() -> None:
    q, k, v = random_inputs(1, 100, 100, 2, 2, 64, torch.bfloat16)
    exact = flash_attn_func(q, k, v, causal=True)
    with pytest.warns(UserWarning, match="softcap is set"):
        nearly_uncapped = flash_attn_func(q, k, v, causal=True, softcap=1e6)
    assert_within_reference_error(nearly_uncapped, exact, exact, atol=2e-2)
    with pytest.raises(ValueError, match="strict"):
        flash_attn_func(q, k, v, softcap=30.0, strict=True)
