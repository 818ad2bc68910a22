"""The activation kernels against float64, with plain torch in the same dtype as the measure of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.activations import ACTIVATIONS, activate, bias_gelu, gated, gelu, operators, swiglu
from flash_attn_ops.dispatch import explain
from torch import Tensor

pytestmark = pytest.mark.gpu

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16

TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Case:
    rows: int
    cols: int
    activation: str
    form: str = "plain"  # or "bias", "two" (gate and value), "gate_value", "value_gate" (packed)
    dtype: torch.dtype = BF16
    bias_dtype: torch.dtype | None = None


SMALL = [
    *(Case(7, 100, activation) for activation in ACTIVATIONS),
    *(Case(33, 300, activation, "bias") for activation in ACTIVATIONS),
    *(Case(5, 36, activation, "value_gate") for activation in ACTIVATIONS),
    Case(3, 1, "gelu", "bias", FP32),
    Case(150, 70, "gelu_tanh", "bias", FP16, FP32),  # more rows than one program sums
    Case(5, 1100, "silu", "two", FP32),
    Case(5, 1100, "silu", "gate_value", FP16),
    Case(9, 1030, "relu", "bias", FP32),
]
LARGE = [
    Case(4099, 11008, "silu", "gate_value"),
    Case(2048, 16384, "gelu_tanh", "bias"),
    Case(2048, 16384, "gelu", "bias", FP32),
    Case(1000, 16383, "squared_relu"),
    Case(3, 3000001, "gelu_tanh", "two", FP16),
]


def plain(case: Case, x: Tensor, second: Tensor | None) -> Tensor:
    if case.form == "bias":
        return TORCH[case.activation](x + second.to(x.dtype))
    if case.form == "two":
        return TORCH[case.activation](x) * second
    if case.form == "plain":
        return TORCH[case.activation](x)
    first, last = x.chunk(2, dim=-1)
    gate, value = (first, last) if case.form == "gate_value" else (last, first)
    return TORCH[case.activation](gate) * value


def ours(case: Case, x: Tensor, second: Tensor | None) -> Tensor:
    if case.form in ("plain", "bias"):
        return activate(x, case.activation, second)
    order = None if case.form == "two" else case.form
    return gated(x, second, activation=case.activation, order=order)


def check(case: Case, device: str) -> None:
    packed = case.form in ("gate_value", "value_gate")
    x = (torch.randn(case.rows, case.cols * (1 + packed), device=device) * 2).to(case.dtype)
    second = None
    if case.form == "bias":
        second = torch.randn(case.cols, device=device).to(case.bias_dtype or case.dtype)
    elif case.form == "two":
        second = torch.randn(case.rows, case.cols, device=device).to(case.dtype)
    assert explain(x).path == "triton"
    d_out = torch.randn(case.rows, case.cols, device=device).to(case.dtype)
    results = []
    for call, exact in ((ours, False), (plain, True), (plain, False)):
        leaves = [
            tensor.to(FP64 if exact else tensor.dtype).clone().requires_grad_()
            for tensor in (x, second)
            if tensor is not None
        ]
        out = call(case, leaves[0], leaves[1] if len(leaves) == 2 else None)
        results.append((out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))))
    for index, (actual, exact, same) in enumerate(zip(*results, strict=True)):
        # float32 sums over the rows in another order than torch's
        atol = 1e-5 if exact.dim() == 2 else 1e-5 + 4e-7 * case.rows
        assert_within_reference_error(actual, exact, same, atol=atol, name=str(index))
        assert actual.dtype == same.dtype and actual.is_contiguous()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("order", [None, "gate_value", "value_gate"])
@pytest.mark.parametrize("with_out", [False, True])
def test_activation_again_and_sums(order: str | None, with_out: bool, device: str) -> None:
    """What dense layers ask of the backward: sums of the gradients, the activation once more."""
    packed = torch.randn(70, 80, device=device)
    gate, value = packed[:, :40], packed[:, 40:]
    if order == "value_gate":
        gate, value = value, gate
    d_out = torch.randn(70, 40, device=device)
    d_gate, d_value, d_bias, out = operators.backward(d_out, gate, None, value, "silu", order, FP32, with_out)
    assert d_bias is not None and (d_value is None) == (order is not None)
    torch.testing.assert_close(d_bias, d_gate.sum(0), rtol=1e-4, atol=1e-4)
    assert (out is not None) == with_out
    if out is not None:
        assert torch.equal(out, operators.forward(gate, None, value, "silu"))
    alone = operators.backward(d_out, gate, None, value, "silu", order, None, False)
    assert torch.equal(alone[0], d_gate) and alone[2] is None and alone[3] is None


def test_strided_and_expanded(device: str) -> None:
    for x in (
        torch.randn(40, 6, device=device).t(),
        torch.randn(6, 80, device=device)[:, :40],
        torch.randn(1, 40, device=device).expand(6, 40),
        torch.randn(2, 40, 3, device=device).transpose(1, 2),
    ):
        leaf, copy = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        bias = torch.randn(40, device=device)
        for call in (gelu, lambda x, b=bias: bias_gelu(x, b), lambda x: swiglu(x, order="gate_value")):
            out, expected = call(leaf), call(copy)
            assert torch.equal(out, expected) and out.is_contiguous()
            upstream = torch.randn(1, device=device).expand(out.shape)
            for first, second in zip(
                torch.autograd.grad(out, leaf, upstream),
                torch.autograd.grad(expected, copy, upstream),
                strict=True,
            ):
                assert torch.equal(first, second)


def test_empty(device: str) -> None:
    for shape in ((0, 6), (3, 0)):
        x, bias = torch.randn(shape, device=device), torch.randn(shape[1], device=device)
        leaves = [tensor.requires_grad_() for tensor in (x, bias)]
        out = bias_gelu(*leaves)
        d_x, d_bias = torch.autograd.grad(out.sum(), leaves)
        assert out.shape == d_x.shape == shape and torch.equal(d_bias, torch.zeros_like(d_bias))
        d_x, _, d_bias, _ = operators.backward(x, x, None, None, "gelu", None, FP32, False)
        assert d_x.shape == shape and torch.equal(d_bias, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str, device: str) -> None:
    x = torch.tensor([-3e38, -1e30, -100.0, 100.0, 1e30, 3e38], device=device, requires_grad=True)
    out = activate(x, activation)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out[:3], torch.zeros_like(out[:3])) and torch.equal(
        slope[:3], torch.zeros_like(out[:3])
    )
    if activation not in ("squared_relu", "sigmoid"):
        assert torch.equal(slope[3:], torch.ones_like(out[3:]))


def test_nan_stays(device: str) -> None:
    x = torch.tensor([float("nan"), 1.0], device=device)
    for activation in ACTIVATIONS:
        assert activate(x, activation).isnan().tolist() == [True, False]


def test_frozen_bias_costs_nothing(device: str) -> None:
    x, bias = torch.randn(5, 40, device=device, requires_grad=True), torch.randn(40, device=device)
    bias_gelu(x, bias).sum().backward()
    assert x.grad is not None and bias.grad is None


def test_same_bits_twice() -> None:
    x = torch.randn(8192, 4096, device="cuda", dtype=BF16)
    bias = torch.randn(4096, device="cuda", dtype=BF16)
    first, second = (operators.backward(x, x, bias, None, "gelu", None, BF16, True) for _ in range(2))
    assert all(torch.equal(first[index], second[index]) for index in (0, 2, 3))


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows come out as they do alone, flat and in rows."""
    rows, cols = 2**31 // 4096 + 9, 4096
    x = torch.randn(rows, cols, device="cuda", dtype=BF16)
    bias = torch.randn(cols, device="cuda", dtype=BF16)
    tail = x[-12:].clone()
    assert torch.equal(gelu(x)[-12:], gelu(tail))
    assert torch.equal(bias_gelu(x, bias)[-12:], bias_gelu(tail, bias))
    assert torch.equal(swiglu(x, order="value_gate")[-12:], swiglu(tail, order="value_gate"))
    d_x, _, d_bias, _ = operators.backward(x, x, bias, None, "gelu", None, FP32, False)
    expected = operators.backward(tail, tail, bias, None, "gelu", None, FP32, False)
    assert torch.equal(d_x[-12:], expected[0]) and d_bias.isfinite().all()
    d_x, _, _, _ = operators.backward(x, x, None, None, "gelu", None, None, False)
    expected = operators.backward(tail, tail, None, None, "gelu", None, None, False)
    assert torch.equal(d_x[-12:], expected[0])


@pytest.mark.parametrize("form", ["bias", "packed", "two"])
def test_compiles_to_one_graph(form: str, device: str) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        if form == "bias":
            return activate(x * 2, "gelu_tanh", y[0])
        return swiglu(x * 2, order="gate_value") if form == "packed" else swiglu(x * 2, y)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 12):
        leaves = [torch.randn(rows, 40, device=device, requires_grad=True) for _ in range(2)]
        out, expected = compiled(*leaves), call(*leaves)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(out)
        used = leaves[:1] if form == "packed" else leaves
        for actual, exact in zip(
            torch.autograd.grad(out, used, upstream),
            torch.autograd.grad(expected, used, upstream),
            strict=True,
        ):
            torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("order", [None, "gate_value"])
@pytest.mark.parametrize("bias_dtype", [None, FP32])
def test_operators_keep_their_word(order: str | None, bias_dtype: torch.dtype | None, device: str) -> None:
    packed, bias = torch.randn(5, 80, device=device), torch.randn(40, device=device)
    gate, value = packed[:, :40], packed[:, 40:]
    registered = torch.ops.flash_attn_ops
    torch.library.opcheck(registered.activation_forward.default, (gate, bias, value, "silu"))
    args = (torch.randn(5, 40, device=device), gate, bias, value, "silu", order, bias_dtype, True)
    torch.library.opcheck(registered.activation_backward.default, args)


@pytest.mark.parametrize("which", ["x", "bias", "gate", "value", "packed"])
def test_recorded_where_anything_wants_a_gradient(which: str, device: str) -> None:
    names = {"x": ("x", "bias"), "bias": ("x", "bias"), "packed": ("packed",)}.get(which, ("gate", "value"))
    given = [torch.randn(16 if name == "bias" else (4, 16), device=device) for name in names]

    def call() -> torch.Tensor:
        if "x" in names:
            return activate(given[0], "gelu", given[1])
        return swiglu(*given, order="gate_value" if which == "packed" else None)

    bare = call()
    assert bare.grad_fn is None
    wanted = given[names.index(which)].requires_grad_()
    out = call()
    assert torch.equal(out.detach(), bare)
    (gradient,) = torch.autograd.grad(out.sum(), wanted)
    assert gradient.shape == wanted.shape and gradient.abs().sum() > 0
    with torch.no_grad():
        assert call().grad_fn is None
