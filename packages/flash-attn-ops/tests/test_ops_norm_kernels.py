"""The norm kernels against float64, with plain torch in the same dtype as the measure of error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.dispatch import explain
from flash_attn_ops.norm import layer_norm, rms_norm
from torch import Tensor

pytestmark = pytest.mark.gpu

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    is_rms: bool = True
    bias: bool = False
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = BF16
    residual_dtype: torch.dtype | None = None
    residual_in_fp32: bool = False
    prenorm: bool = False
    eps: float = 1e-5


SMALL = [
    Case((7, 64)),
    Case((7, 64), is_rms=False, bias=True),
    Case((2, 3, 100), is_rms=False, bias=True, weight_dtype=FP32),
    Case((2, 3, 100), bias=True, weight_dtype=FP32, prenorm=True, residual_dtype=BF16),
    Case((5, 1), is_rms=False, bias=True, dtype=FP32, weight_dtype=FP32),
    Case((5, 1), dtype=FP32, weight_dtype=FP32, eps=1e-2),
    Case((129, 257), dtype=FP32, weight_dtype=FP32, residual_dtype=FP32, eps=1e-2),
    Case((9, 96), is_rms=False, residual_dtype=FP32, prenorm=True),
    Case((9, 96), is_rms=False, bias=True, residual_dtype=BF16, residual_in_fp32=True, prenorm=True),
    Case((9, 96), prenorm=True, residual_in_fp32=True),
    Case((9, 96), prenorm=True),
    Case((3, 80), is_rms=False, bias=True, dtype=FP16, weight_dtype=FP16, residual_dtype=FP16),
]
LARGE = [
    Case((517, 1024), is_rms=False, bias=True),
    Case((517, 3000)),
    Case((1031, 4096), residual_dtype=BF16, prenorm=True),
    Case((301, 5120), is_rms=False, bias=True),
    Case((301, 8192), residual_dtype=FP32, prenorm=True),
    Case((203, 16384), is_rms=False, bias=True),
    Case((203, 16384)),
    Case((67, 33000), is_rms=False, bias=True),
    Case((67, 65536)),
    Case(
        (301, 8192), is_rms=False, bias=True, dtype=FP32, weight_dtype=FP32, residual_dtype=FP32, prenorm=True
    ),
]


def inputs(case: Case, device: str) -> dict[str, Tensor | None]:
    """Rows with a mean of about 1 and weights of about 1, so that neither is lost unseen."""
    size = case.shape[-1]

    def draw(shape: tuple[int, ...], dtype: torch.dtype, centre: float) -> Tensor:
        return (torch.randn(shape, device=device) + centre).to(dtype)

    return {
        "x": draw(case.shape, case.dtype, 1.0),
        "weight": draw((size,), case.weight_dtype, 1.0),
        "bias": draw((size,), case.weight_dtype, 0.0) if case.bias else None,
        "residual": draw(case.shape, case.residual_dtype, 0.0) if case.residual_dtype else None,
    }


def gradients_of(case: Case, device: str) -> list[Tensor]:
    out = torch.randn(case.shape, device=device).to(case.dtype)
    sum_dtype = FP32 if case.residual_in_fp32 else case.residual_dtype or case.dtype
    return [out, torch.randn(case.shape, device=device).to(sum_dtype)][: 1 + case.prenorm]


def ours(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    norm = rms_norm if case.is_rms else layer_norm
    outputs = norm(
        x,
        weight,
        bias,
        residual=residual,
        eps=case.eps,
        prenorm=case.prenorm,
        residual_in_fp32=case.residual_in_fp32,
    )
    return list(outputs) if case.prenorm else [outputs]


def plain(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> list[Tensor]:
    """torch's own norms, in float64 if the inputs are, otherwise in x's dtype as users compose them."""
    total = x if residual is None else x + residual
    if x.dtype != torch.float64:
        total = total.to(FP32 if case.residual_in_fp32 else case.residual_dtype or case.dtype)
    rows, scale = total.to(x.dtype), weight.to(x.dtype)
    shift = None if bias is None else bias.to(x.dtype)
    if case.is_rms:
        out = F.rms_norm(rows, rows.shape[-1:], scale, case.eps)
        out = out if shift is None else out + shift
    else:
        out = F.layer_norm(rows, rows.shape[-1:], scale, shift, case.eps)
    return [out, total][: 1 + case.prenorm]


def outputs_and_gradients(compute, case, given, upstream, dtype=None) -> dict[str, Tensor]:
    leaves = {
        name: None if tensor is None else tensor.to(dtype or tensor.dtype).clone().requires_grad_()
        for name, tensor in given.items()
    }
    outputs = compute(case, **leaves)
    torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)])
    results = dict(zip(("out", "residual_out"), outputs, strict=False))
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def check(case: Case, device: str) -> None:
    given, upstream = inputs(case, device), gradients_of(case, device)
    assert explain(*(tensor for tensor in given.values() if tensor is not None)).path == "triton"
    actual = outputs_and_gradients(ours, case, given, upstream)
    reference = outputs_and_gradients(plain, case, given, upstream, torch.float64)
    same_dtype = outputs_and_gradients(plain, case, given, upstream)
    for name, tensor in actual.items():
        factor = 3.0 if name.startswith("d_") else 2.0
        assert_within_reference_error(tensor, reference[name], same_dtype[name], factor=factor, name=name)
        assert tensor.dtype == same_dtype[name].dtype, name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize(
    "case",
    [
        Case((37, 300), is_rms=False, bias=True, residual_dtype=BF16, prenorm=True),
        Case((37, 300), dtype=FP32),
    ],
    ids=str,
)
def test_rows_too_long_for_registers(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that walk the columns, on rows that are long only to smaller limits."""
    from flash_attn_ops.norm import triton_kernels

    for name, value in {
        "MAX_FORWARD_COLS": 16,
        "MAX_BACKWARD_COLS": 16,
        "WIDE_COLS": 128,
        "WIDE_GRADIENT_ROWS": 4,
        "WIDE_GRADIENT_COLS": 64,
    }.items():
        monkeypatch.setattr(triton_kernels, name, value)
    check(case, device)
    if case.residual_dtype is not None:  # another path through the same kernels: nothing but the output
        check(replace(case, prenorm=False), device)


@pytest.mark.parametrize("is_rms", [False, True])
def test_a_mean_far_from_zero(is_rms: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are centred before they are squared, in blocks too."""
    from flash_attn_ops.norm import triton_kernels

    case = Case((5, 300), is_rms=is_rms, dtype=FP32, weight_dtype=FP32)
    x = torch.randn(case.shape, device=device) + 1000.0
    weight = torch.ones(300, device=device)
    exact = plain(case, x.double(), weight.double(), None, None)[0]
    rounding_of_the_mean = (
        1000 * 2.0**-22
    )  # two units in the last place; squares of 1e6 would lose the variance
    for max_cols in (triton_kernels.MAX_FORWARD_COLS, 16):
        monkeypatch.setattr(triton_kernels, "MAX_FORWARD_COLS", max_cols)
        monkeypatch.setattr(triton_kernels, "WIDE_COLS", 128)
        error = (ours(case, x, weight, None, None)[0].double() - exact).abs().max()
        assert error < rounding_of_the_mean, f"{max_cols}: {error}"


def test_strided_inputs_and_gradients(device: str) -> None:
    """Rows with gaps, columns with gaps, an expanded gradient: same results as for contiguous copies."""
    case = Case((6, 64), is_rms=False, dtype=FP32, weight_dtype=FP32)
    weight = torch.randn(64, device=device)
    variants = {
        "rows with gaps": torch.randn(6, 100, device=device)[:, 20:84],
        "transposed": torch.randn(64, 6, device=device).t(),
        "batch of rows": torch.randn(3, 4, 64, device=device)[:, 1:3],
        "expanded": torch.randn(1, 64, device=device).expand(6, 64),
    }
    for name, x in variants.items():
        leaf, copy = x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()
        out, expected = (ours(case, tensor, weight, None, None)[0] for tensor in (leaf, copy))
        assert out.is_contiguous(), name
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_only_the_returned_sum_used(device: str) -> None:
    x, residual = (torch.randn(4, 32, device=device, dtype=BF16, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=device, dtype=BF16, requires_grad=True)
    _, total = rms_norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True)
    upstream = torch.randn_like(total)
    total.backward(upstream)
    assert torch.equal(x.grad, upstream.to(BF16)) and torch.equal(residual.grad, upstream.to(BF16))
    assert weight.grad is None


def test_no_grad_gives_the_same_output(device: str) -> None:
    case = Case((5, 48), is_rms=False, bias=True, residual_dtype=BF16)
    given = {name: t if t is None else t.requires_grad_() for name, t in inputs(case, device).items()}
    with_grad = ours(case, **given)[0]
    with torch.no_grad():
        without = ours(case, **given)[0]
    torch.testing.assert_close(with_grad, without)
    assert with_grad.requires_grad and not without.requires_grad


def test_double_backward_is_an_error(device: str) -> None:
    x = torch.randn(2, 16, device=device, requires_grad=True)
    out = rms_norm(x, torch.ones(16, device=device))
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("size", [512, 4096, 40000])
def test_same_bits_twice(size: int) -> None:
    case = Case((3001, size), is_rms=False, bias=True)
    given, upstream = inputs(case, "cuda"), gradients_of(case, "cuda")
    first, second = (outputs_and_gradients(ours, case, given, upstream) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows come out as they do alone."""
    rows, size = 2**31 // 8192 + 37, 8192
    x = torch.randn(rows, size, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.randn(size, device="cuda", dtype=BF16)
    tail = x[-40:].detach().clone().requires_grad_()
    out, expected = rms_norm(x, weight), rms_norm(tail, weight)
    assert torch.equal(out[-40:], expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream[-40:])
    assert torch.equal(x.grad[-40:], tail.grad)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_compiles_to_one_graph(norm, device: str) -> None:
    """With every combination of outputs: the sum returned, stored, neither; gradients of one dtype and of two."""

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, total = norm(x * 2, weight, bias, residual=residual, prenorm=True)
        out = norm(out, weight, residual=residual.half())
        return (norm(out, weight, bias) + total).square()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (33, 100):
        shapes = ((3, rows, 256), (3, rows, 256), (256,), (256,))
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out, expected = compiled(*leaves), block(*copies)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), expected)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("present", [False, True])
def test_operators_keep_their_word(is_rms: bool, present: bool, device: str) -> None:
    """Schema and fake describe what the launchers do, with all optional tensors or none, dense or strided."""
    x = torch.randn(5, 3, 32, device=device).to(FP16).transpose(0, 1)
    weight, bias = torch.randn(2, 64, device=device)[:, ::2]
    residual = torch.randn(3, 5, 32, device=device) if present else None
    sum_dtype = FP32 if present else FP16
    norm_forward, norm_backward = (
        torch.ops.flash_attn_ops.norm_forward,
        torch.ops.flash_attn_ops.norm_backward,
    )
    args = (x, weight, bias if present else None, residual, 1e-5, is_rms, sum_dtype, present, True)
    torch.library.opcheck(norm_forward.default, args)
    torch.library.opcheck(norm_forward.default, (*args[:-1], False))
    _, total, mean, rstd = norm_forward(*args)
    total = total if present else x
    mean = None if is_rms else mean
    args = (x, residual, total, weight, mean, rstd, is_rms, FP16)
    torch.library.opcheck(norm_backward.default, (*args, *((FP32, FP32) if present else (None, None))))
