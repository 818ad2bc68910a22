"""Activations away from the GPU: the reference against equations, the options, both packings, rejected arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops import activations
from flash_attn_ops.activations import (
    ACTIVATIONS,
    Activation,
    GatedActivation,
    activate,
    bias_gelu,
    gated,
    geglu,
    gelu,
    reference,
    reglu,
    relu,
    silu,
    squared_relu,
    swiglu,
)
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

TEXTBOOK: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=FP64).to(out.dtype)
    return torch.autograd.grad(out, leaves, upstream)


def test_every_activation_has_an_equation() -> None:
    assert tuple(TEXTBOOK) == ACTIVATIONS


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_the_equation(activation: str) -> None:
    x, bias, value = (
        torch.randn(shape, dtype=FP64, requires_grad=True) for shape in ((3, 4, 7), 7, (3, 4, 7))
    )
    for ours, theirs, leaves in (
        (activate(x, activation), TEXTBOOK[activation](x), (x,)),
        (activate(x, activation, bias), TEXTBOOK[activation](x + bias), (x, bias)),
        (gated(x, value, activation=activation), TEXTBOOK[activation](x) * value, (x, value)),
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, *leaves), gradients(theirs, *leaves))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounds_once(activation: str, dtype: torch.dtype) -> None:
    x, value = torch.randn(50, 40).to(dtype), torch.randn(50, 40).to(dtype)
    results = []
    for precision, call in ((dtype, None), (FP64, TEXTBOOK[activation]), (dtype, TEXTBOOK[activation])):
        leaves = [tensor.to(precision).requires_grad_() for tensor in (x, value)]
        out = gated(*leaves, activation=activation) if call is None else call(leaves[0]) * leaves[1]
        results.append((out, *gradients(out, *leaves)))
    for actual, exact, same in zip(*results, strict=True):
        assert_within_reference_error(actual, exact, same)
        assert actual.dtype == dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["gate_value", "value_gate"])
def test_gradcheck(activation: str, order: str) -> None:
    packed = torch.randn(3, 8, dtype=FP64, requires_grad=True)
    bias = torch.randn(8, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated(x, activation=activation, order=order), (packed,))
    assert torch.autograd.gradcheck(lambda x, b: activate(x, activation, b), (packed, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", [None, "gate_value", "value_gate"])
def test_written_gradient_is_autograds(activation: str, order: str | None) -> None:
    """reference.backward, which dense layers run where there are no kernels."""
    packed = torch.randn(5, 12, dtype=FP64, requires_grad=True)
    d_out = torch.randn(5, 6, dtype=FP64)
    gate, value = packed[:, :6], packed[:, 6:]
    if order == "value_gate":
        gate, value = value, gate
    out = reference.forward(gate, None, value, activation)
    (expected,) = torch.autograd.grad(out, packed, d_out)
    d_gate, d_value, d_bias, again = reference.backward(
        d_out, gate, None, value, activation, order, FP64, True
    )
    torch.testing.assert_close(again, out)
    if order is None:
        assert d_value is not None
        torch.testing.assert_close(torch.cat((d_gate, d_value), dim=-1), expected)
        torch.testing.assert_close(d_bias, d_gate.sum(0))
    else:
        assert d_value is None
        torch.testing.assert_close(d_gate, expected)
        torch.testing.assert_close(d_bias, expected.sum(0))


def test_bias_gelu_has_two_gradients() -> None:
    """A backward that returns a pair for each argument is an old defect of this function's namesake."""
    x, bias = (torch.randn(shape, dtype=FP64, requires_grad=True) for shape in ((5, 7), 7))
    out = bias_gelu(x, bias)
    torch.testing.assert_close(out, F.gelu(x + bias, approximate="tanh"))
    d_x, d_bias = gradients(out, x, bias)
    torch.testing.assert_close(d_bias, d_x.sum(0))
    assert d_x.shape == x.shape and d_bias.shape == bias.shape


def test_named_functions() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(gelu(x), activate(x, "gelu"))
    assert torch.equal(gelu(x, "tanh"), activate(x, "gelu_tanh"))
    assert torch.equal(relu(x), activate(x, "relu"))
    assert torch.equal(squared_relu(x), activate(x, "squared_relu"))
    assert torch.equal(silu(x), activate(x, "silu"))
    assert torch.equal(swiglu(x, y), gated(x, y, activation="silu"))
    assert torch.equal(reglu(x, y), gated(x, y, activation="relu"))
    assert torch.equal(geglu(x, y), gated(x, y, activation="gelu"))
    assert torch.equal(geglu(x, y, approximate="tanh"), gated(x, y, activation="gelu_tanh"))
    for other, name in (("gelu_approx", "gelu_tanh"), ("sqrelu", "squared_relu"), ("swish", "silu")):
        assert torch.equal(activate(x, other), activate(x, name))


def test_packing() -> None:
    gate, value = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    expected = swiglu(gate, value)
    assert torch.equal(swiglu(torch.cat((gate, value), dim=-1), order="gate_value"), expected)
    assert torch.equal(swiglu(torch.cat((value, gate), dim=-1), order="value_gate"), expected)


def test_every_option_acts() -> None:
    x, bias = torch.randn(4, 6), torch.randn(6)
    results = [activate(x, activation) for activation in ACTIVATIONS]
    results += [activate(x, "gelu", bias), bias_gelu(x, bias), bias_gelu(x, bias, "none") + 1]
    results += [activate(swiglu(x, order="gate_value").repeat(1, 2), "relu")]
    for i, first in enumerate(results):
        assert not any(torch.equal(first, second) for second in results[i + 1 :]), i
    assert not torch.equal(swiglu(x, order="gate_value"), swiglu(x, order="value_gate"))
    assert not torch.equal(bias_gelu(x, bias), bias_gelu(x, bias, "none"))
    assert not torch.equal(geglu(x, x), geglu(x, x, approximate="tanh"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str) -> None:
    x = torch.tensor([-3e38, -1e30, -100.0, 100.0, 1e30, 3e38], requires_grad=True)
    out = activate(x, activation)
    (slope,) = torch.autograd.grad(out.sum(), x)
    written = reference.derivative(x.detach(), activation)
    limits = {"relu": (0.0, 1.0), "sigmoid": (0.0, 0.0), "squared_relu": None}.get(activation, (0.0, 1.0))
    assert torch.equal(out[:3], torch.zeros(3))
    if limits is not None:
        expected = torch.tensor(limits).repeat_interleave(3)
        assert torch.equal(written, expected)
        if activation != "gelu_tanh":  # of which autograd's own gradient overflows
            assert torch.equal(slope, expected)


def test_empty_scalar_and_strided() -> None:
    for shape in ((0, 6), (3, 0), (0,)):
        x = torch.randn(shape, requires_grad=True)
        out = gelu(x)
        out.sum().backward()
        assert out.shape == shape and x.grad is not None and x.grad.shape == shape
    assert swiglu(torch.randn(3, 0), order="gate_value").shape == (3, 0)
    scalar = torch.tensor(0.7)
    assert torch.equal(gelu(scalar), gelu(scalar[None])[0]) and gelu(scalar).dim() == 0
    x = torch.randn(6, 4).t()
    for call in (gelu, lambda x: swiglu(x, order="gate_value")):
        out = call(x)
        torch.testing.assert_close(out, call(x.contiguous()))
        assert out.is_contiguous()


def test_compiles_to_one_graph() -> None:
    def both(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(swiglu(x, order="value_gate"), bias)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        x, bias = torch.randn(rows, 8, requires_grad=True), torch.randn(4, requires_grad=True)
        torch.testing.assert_close(gradients(compiled(x, bias), x, bias), gradients(both(x, bias), x, bias))


def test_autocast_changes_nothing() -> None:
    x, bias = torch.randn(5, 8), torch.randn(8)

    def every() -> list[Tensor]:
        return [*(activate(x, name, bias) for name in ACTIVATIONS), swiglu(x, order="gate_value")]

    expected = every()
    with torch.autocast("cpu", dtype=BF16):
        assert all(torch.equal(ours, outside) for ours, outside in zip(every(), expected, strict=True))


def test_modules_are_the_functions() -> None:
    x = torch.randn(5, 8)
    assert torch.equal(Activation("gelu_approx")(x), gelu(x, "tanh"))
    assert torch.equal(GatedActivation("silu", "value_gate")(x), swiglu(x, order="value_gate"))
    assert "gelu_tanh" in repr(Activation("gelu_approx"))
    assert "value_gate" in repr(GatedActivation("silu", "value_gate"))


X = torch.ones(5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activate(X, "tanh"), r"activation: got 'tanh'; expected one of 'gelu'"),
        (lambda: Activation("tanh"), r"activation: got 'tanh'"),
        (lambda: Activation(["gelu"]), r"activation: got \['gelu'\]"),
        (lambda: gelu(X.to(torch.float8_e4m3fn)), r"x: got torch.float8_e4m3fn; .* of 16 bits or more"),
        (lambda: gelu(None), r"x: got None; expected a torch.Tensor"),
        (lambda: swiglu(None, order="gate_value"), r"gate: got None; expected a torch.Tensor"),
        (lambda: gelu(X, "erf"), r"approximate: got 'erf'; expected 'none' or 'tanh'"),
        (lambda: gelu(X.long()), r"x: got torch.int64; expected a floating-point dtype"),
        (lambda: bias_gelu(X, X[0, :7]), r"bias: got shape \(7,\); expected \(8,\)"),
        (lambda: bias_gelu(X, X[0].to("meta")), r"bias: got a tensor on meta; expected cpu"),
        (lambda: bias_gelu(torch.tensor(1.0), X[0]), r"x: got a scalar"),
        (lambda: swiglu(X), r"order: got None; expected 'gate_value' or 'value_gate'"),
        (lambda: swiglu(X, order="gate"), r"order: got 'gate'"),
        (lambda: GatedActivation("silu", "gate"), r"order: got 'gate'"),
        (lambda: swiglu(X, X, order="gate_value"), r"order: got 'gate_value'; expected None"),
        (lambda: swiglu(X[:, :7], order="gate_value"), r"gate: got shape \(5, 7\); expected \(\.\.\., 2N\)"),
        (lambda: swiglu(X, X[:, :7]), r"value: got shape \(5, 7\); expected \(5, 8\)"),
        (lambda: swiglu(X, X.double()), r"value: got torch.float64; expected torch.float32"),
        (lambda: swiglu(torch.tensor(1.0), order="gate_value"), r"gate: got a scalar"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_rejected_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "Fix: " in str(error.value)


def test_all_names_exist() -> None:
    assert all(hasattr(activations, name) for name in activations.__all__)
