"""LayerNorm and RMSNorm away from the GPU: the reference, the options, the modules, rejected arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NORMS = pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)


def textbook(norm, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The equations, in the dtype of x."""
    if norm is layer_norm:
        centred = x - x.mean(-1, keepdim=True)
        out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    else:
        out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


@NORMS
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_against_the_equations_in_float64(norm, dtype: torch.dtype, with_residual: bool) -> None:
    x, residual = (torch.randn(2, 5, 33) + 1).to(dtype), torch.randn(2, 5, 33).to(dtype)
    weight, bias, upstream = (
        torch.randn(33).to(dtype),
        torch.randn(33).to(dtype),
        torch.randn(2, 5, 33).to(dtype),
    )
    results = []
    for kind, precision in (("ours", dtype), ("exact", FP64), ("same", dtype)):
        leaves = [tensor.to(precision).clone().requires_grad_() for tensor in (x, weight, bias, residual)]
        x_, weight_, bias_, residual_ = leaves
        if kind == "ours":
            out = norm(x_, weight_, bias_, residual=residual_ if with_residual else None)
        else:
            out = textbook(norm, x_ + residual_ if with_residual else x_, weight_, bias_)
        out.backward(upstream.to(precision))
        results.append([out, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for index, (actual, exact, same) in enumerate(zip(*results, strict=True)):
        assert_within_reference_error(actual, exact, same, factor=2.0 if index == 0 else 3.0)


@NORMS
def test_gradcheck(norm) -> None:
    def both_outputs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, weight, bias, residual=residual, prenorm=True)

    shapes = ((3, 5), (5,), (5,), (3, 5))
    inputs = [torch.randn(shape, dtype=FP64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(both_outputs, inputs)


@NORMS
def test_every_option_acts(norm) -> None:
    x, residual = torch.randn(2, 4, 8).to(BF16)
    weight, bias = torch.randn(2, 8).to(BF16)
    plain = norm(x, weight)
    assert plain.dtype == BF16
    assert not torch.equal(norm(x, weight, bias), plain)
    assert not torch.equal(norm(x, weight, residual=residual), plain)
    assert not torch.equal(norm(x, weight, eps=1.0), plain)
    out, total = norm(x, weight, residual=residual, prenorm=True)
    assert torch.equal(total, x + residual) and torch.equal(out, norm(total, weight))
    out, total = norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True)
    assert total.dtype == FP32 and torch.equal(total, x.float() + residual.float()) and out.dtype == BF16
    out, total = norm(x, weight, prenorm=True, residual_in_fp32=True)
    assert total.dtype == FP32 and torch.equal(out, plain)
    _, total = norm(x, weight, prenorm=True)
    assert torch.equal(total, x) and total.dtype == BF16


@NORMS
def test_dtypes_may_differ(norm) -> None:
    x, residual, weight = torch.randn(4, 8).to(BF16), torch.randn(4, 8), torch.randn(8, dtype=FP32)
    out, total = norm(x, weight, residual=residual, prenorm=True)
    assert out.dtype == BF16 and total.dtype == FP32
    double, total = norm(x.double(), weight, prenorm=True, residual_in_fp32=True)
    assert double.dtype == FP64 and total.dtype == FP64, "float32 at least, never less than the input"


@NORMS
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8), (8,)], ids=str)
def test_empty_and_single_rows(norm, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    out, total = norm(x, weight, bias, residual=torch.randn(shape), prenorm=True)
    (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == shape
    assert x.grad.shape == shape and weight.grad.shape == bias.grad.shape == weight.shape
    if 0 in shape:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@NORMS
def test_any_strides(norm) -> None:
    weight = torch.randn(6)
    for x in (torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2], torch.randn(1, 6).expand(5, 6)):
        torch.testing.assert_close(norm(x, weight), norm(x.contiguous(), weight))


@NORMS
def test_compiles_to_one_graph(norm) -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        out, total = norm(x, weight, residual=x * 2, prenorm=True)
        return out + total

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        leaf, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(8)
        copy = leaf.detach().clone().requires_grad_()
        compiled(leaf, weight).sum().backward()
        block(copy, weight).sum().backward()
        torch.testing.assert_close(leaf.grad, copy.grad)


@NORMS
def test_autocast_changes_nothing(norm) -> None:
    x, weight = torch.randn(4, 8).to(BF16), torch.randn(8)
    expected = norm(x, weight)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(norm(x, weight), expected)


def test_modules_match_torch() -> None:
    x, residual = torch.randn(2, 3, 4, 16)
    for ours, theirs in (
        (LayerNorm(16, eps=1e-3), torch.nn.LayerNorm(16, eps=1e-3)),
        (LayerNorm(16, bias=False), torch.nn.LayerNorm(16, bias=False)),
        (RMSNorm(16, eps=1e-4), torch.nn.RMSNorm(16, eps=1e-4)),
    ):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(-1, 1)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        out, total = ours(x.to(BF16), residual=residual.to(BF16), prenorm=True, residual_in_fp32=True)
        assert total.dtype == FP32 and out.dtype == BF16
    assert torch.equal(LayerNorm(5).weight, torch.ones(5)) and torch.equal(LayerNorm(5).bias, torch.zeros(5))
    assert RMSNorm(5, dtype=BF16).weight.dtype == BF16 and "eps=0.1" in repr(RMSNorm(5, eps=0.1))


def test_matches_torch_functional_bit_for_bit_in_float32() -> None:
    """On a CPU LayerNorm is torch's own kernel."""
    x, weight, bias = torch.randn(4, 16), torch.randn(16), torch.randn(16)
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (16,), weight, bias))


GOOD = {"x": torch.ones(2, 4), "weight": torch.ones(4)}


@NORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, r"x: got torch.int64; expected a floating-point dtype"),
        ({"x": torch.tensor(1.0)}, r"x: got a scalar; expected at least one dimension"),
        ({"x": [1.0]}, r"x: got list; expected a torch.Tensor"),
        ({"weight": torch.ones(5)}, r"weight: got shape \(5,\); expected \(4,\), the last dimension of x"),
        ({"weight": torch.ones(4, device="meta")}, r"weight: got a tensor on meta; expected cpu, where x is"),
        ({"bias": torch.ones(1)}, r"bias: got shape \(1,\); expected \(4,\)"),
        ({"residual": torch.ones(4)}, r"residual: got shape \(4,\); expected \(2, 4\), the shape of x"),
        ({"eps": -1.0}, r"eps: got -1.0; expected a number >= 0"),
        ({"eps": float("nan")}, r"eps: got nan"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_rejected_arguments(norm, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        norm(**{**GOOD, **change})
    assert "Fix: " in str(error.value)


def test_rejected_hidden_size() -> None:
    with pytest.raises(ValueError, match=r"hidden_size: got -1"):
        RMSNorm(-1)
