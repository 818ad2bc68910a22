"""Dense layers away from the GPU: against their definition, options, what is kept and computed, rejected arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels import gemm, library
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.activations import ACTIVATIONS
from flash_attn_ops.fused_dense import (
    FusedDense,
    FusedGatedMLP,
    FusedMLP,
    functional,
    gated_mlp,
    linear,
    mlp,
    reference,
)
from flash_attn_ops.fused_dense.plans import Plan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ORDERS = (None, "gate_value", "value_gate")
K, H, N = 6, 8, 5


def leaves(order: str | None, dtype: torch.dtype = FP64, scale: float = 0.5) -> list[Tensor]:
    """x, weight1, weight2, bias1, bias2."""
    width = H if order is None else 2 * H
    shapes = ((2, 3, K), (width, K), (N, H), (width,), (N,))
    return [(torch.randn(shape) * scale).to(dtype).requires_grad_() for shape in shapes]


def call(order: str | None, *tensors: Tensor | None, **options: Any) -> Any:
    return mlp(*tensors, **options) if order is None else gated_mlp(*tensors, order=order, **options)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=FP64).to(out.dtype)
    return torch.autograd.grad(out, inputs, upstream)


def copies(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_definition(activation: str, order: str | None) -> None:
    """At every level, with and without biases. The squared relu was a plain relu here in the system before."""
    tensors = leaves(order)
    for level, with_biases in itertools.product((0, 1, 2), (True, False)):
        used = tensors if with_biases else tensors[:3]
        arguments = [*used, *([None] * (5 - len(used)))]
        out = call(order, *arguments, activation=activation, checkpoint_lvl=level)
        expected = reference.mlp(*arguments, activation, order)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, used), gradients(expected, used))


@pytest.mark.parametrize("order", [None, "value_gate"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "squared_relu"])
def test_gradcheck(activation: str, order: str | None) -> None:
    tensors = leaves(order)
    assert torch.autograd.gradcheck(lambda *t: call(order, *t, activation=activation), tensors)
    x, weight, _, bias, _ = tensors
    assert torch.autograd.gradcheck(lambda *t: linear(*t, return_residual=True), (x, weight, bias))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "squared_relu"])
def test_bf16(activation: str, order: str | None) -> None:
    tensors = leaves(order, BF16)
    results = []
    for dtype, function in ((BF16, None), (FP64, reference.mlp), (BF16, reference.mlp)):
        used = copies(tensors, dtype)
        out = (
            call(order, *used, activation=activation)
            if function is None
            else function(*used, activation, order)
        )
        results.append((out, *gradients(out, used)))
    for actual, exact, same in zip(*results, strict=True):
        assert_within_reference_error(actual, exact, same, factor=3.0)
        assert actual.dtype == BF16


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias: bool) -> None:
    x, weight, _, shift, _ = leaves(None)
    used = [x, weight, shift] if bias else [x, weight]
    out, expected = linear(*used), F.linear(*used)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, used), gradients(expected, used))


def test_returned_residual_joins_the_gradient() -> None:
    tensors = leaves(None)
    x, weight = tensors[0], torch.randn(K, K, dtype=FP64, requires_grad=True)
    used = [*tensors, weight]
    hidden, residual = linear(x, weight, return_residual=True)
    out, again = mlp(hidden, *tensors[1:], return_residual=True)
    assert torch.equal(residual, x) and torch.equal(again, hidden)
    expected_hidden = F.linear(x, weight)
    expected = reference.mlp(expected_hidden, *tensors[1:], "gelu_tanh")
    total, expected_total = (a.sum() + (b**2).sum() + (c**3).sum() for a, b, c in (
        (out, again, residual), (expected, expected_hidden, x)
    ))  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(total, used), torch.autograd.grad(expected_total, used))
    alone = torch.autograd.grad(linear(x, weight, return_residual=True)[1].sum(), x)
    assert torch.equal(alone[0], torch.ones_like(x)), "only the residual was used"
    alone = torch.autograd.grad(mlp(*tensors, return_residual=True)[1].sum(), x)
    assert torch.equal(alone[0], torch.ones_like(x))


@pytest.mark.parametrize(("order", "activation"), [(None, "silu"), (None, "relu"), ("gate_value", "silu")])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "needed", [flags for flags in itertools.product((False, True), repeat=5) if any(flags)]
)
def test_only_what_is_needed(
    needed: tuple[bool, ...], level: int, order: str | None, activation: str
) -> None:
    """A bias of a frozen weight gets a reduced gradient; products of no use are not computed."""
    tensors = leaves(order)
    for tensor, flag in zip(tensors, needed, strict=True):
        tensor.requires_grad_(flag)
    used = [tensor for tensor, flag in zip(tensors, needed, strict=True) if flag]
    out = call(order, *tensors, activation=activation, checkpoint_lvl=level)
    with CountProducts() as counted:
        actual = gradients(out, used)
    torch.testing.assert_close(actual, gradients(reference.mlp(*tensors, activation, order), used))
    x, weight1, weight2, bias1, _ = needed
    through = x or weight1 or bias1
    recomputed = level == 2
    assert counted.products == through + x + weight1 + weight2 + recomputed


class CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [None, "gate_value"])
def test_levels_keep_less_and_change_nothing(order: str | None) -> None:
    tensors = leaves(order, FP32)
    results, kept = [], []
    for level in (0, 1, 2):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            out = call(order, *tensors, checkpoint_lvl=level)
        results.append((out, *gradients(out, tensors)))
        kept.append(sum(sizes))
    pre, act = 6 * tensors[1].shape[0], 6 * H
    assert kept[0] - kept[1] == act and kept[1] - kept[2] == pre - tensors[3].numel()
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_relu_keeps_no_pre_activation() -> None:
    tensors, kept = leaves(None), []
    for activation in ("relu", "silu"):
        found: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, found=found: (found.add(tensor.data_ptr()), tensor)[1], lambda tensor: tensor
        ):
            out = mlp(*tensors, activation=activation)
        kept.append(len(found))
        del out
    assert kept[1] - kept[0] == 1


EPILOGUES = [
    (activation, level, Plan(*chosen))
    for activation in ("gelu_tanh", "relu")
    for level in (0, 1, 2)
    for chosen in itertools.product((False, True), repeat=4)
    if any(chosen)
    # The bit mask of a relu comes from the forward, and has no activation in it.
    if not (activation == "relu" and chosen[1] and (not chosen[0] or level == 1))
]


@pytest.fixture
def cublaslt_in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of flash_attn_kernels.gemm by torch operations, and the names of those that ran."""
    ran: list[str] = []

    def activate(x: Tensor, activation: str) -> Tensor:
        return x.relu() if activation == "relu" else F.gelu(x, approximate="tanh")

    def linear_act(
        x: Tensor, weight: Tensor, bias: Tensor, activation: str, *, save: bool, algorithm: int
    ) -> Any:
        ran.append("forward")
        pre = F.linear(x, weight, bias)
        saved = (pre > 0).to(torch.uint8) if activation == "relu" else pre
        return activate(pre, activation), saved if save else None

    def act_gradient(
        d_out: Tensor, weight: Tensor, saved: Tensor, activation: str, *, bias_gradient: bool, algorithm: int
    ) -> Any:
        ran.append("backward")
        assert (saved.dtype == torch.uint8) == (activation == "relu")
        if activation == "relu":
            d_pre = d_out @ weight * saved
        else:
            with torch.enable_grad():
                pre = saved.detach().requires_grad_()
                (d_pre,) = torch.autograd.grad(activate(pre, activation), pre, d_out @ weight)
        return d_pre, d_pre.sum(0) if bias_gradient else None

    def weight_and_bias_gradient(d_out: Tensor, x: Tensor, *, algorithm: int) -> Any:
        ran.append("bias")
        return d_out.t() @ x, d_out.sum(0)

    def matmul(a: Tensor, b: Tensor, *, algorithm: int) -> Tensor:
        ran.append("products")
        return a @ b

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, algorithm: int) -> Tensor:
        ran.append("products")
        return F.linear(x, weight, bias)

    for function in (linear_act, act_gradient, weight_and_bias_gradient, matmul, linear):
        monkeypatch.setattr(gemm, function.__name__, function)
    yield ran


def use_plan(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """For every layer, also where another was chosen for calls like it."""
    for choice in ("_linear_plan", "_mlp_steps"):
        monkeypatch.setattr(functional, choice, getattr(functional, choice).__wrapped__)
    for choice in ("plan_linear", "plan_mlp"):
        monkeypatch.setattr(functional, choice, lambda *_: plan)


@pytest.mark.parametrize(("activation", "level", "plan"), EPILOGUES, ids=str)
def test_epilogues_are_put_together_right(
    plan: Plan, activation: str, level: int, monkeypatch: pytest.MonkeyPatch, cublaslt_in_torch: list[str]
) -> None:
    use_plan(monkeypatch, plan)
    tensors = leaves(None)
    out = mlp(*tensors, activation=activation, checkpoint_lvl=level)
    expected = reference.mlp(*tensors, activation)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))
    names = [name for name in ("forward", "backward", "bias", "products") if getattr(plan, name)]
    assert set(cublaslt_in_torch) == set(names)
    recomputed = level == 2
    if plan.products:  # every product is one of these
        assert len(cublaslt_in_torch) == 6 + recomputed
    with torch.no_grad():
        torch.testing.assert_close(mlp(*tensors, activation=activation), expected)
    for frozen in range(5):
        used = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate(tensors)]
        used.pop(frozen)
        out = mlp(*tensors, activation=activation, checkpoint_lvl=level)
        torch.testing.assert_close(gradients(out, used), gradients(reference.mlp(*tensors, activation), used))


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(bias=True), Plan(products=True), Plan(bias=True, products=True)], ids=str
)
def test_linear_put_together(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, cublaslt_in_torch: list[str]
) -> None:
    use_plan(monkeypatch, plan)
    x, weight, _, bias, _ = leaves(None)
    used = [x, weight, bias]
    out, residual = linear(*used, return_residual=True)
    total, expected = out.square().sum() + residual.sum(), F.linear(*used).square().sum() + x.sum()
    torch.testing.assert_close(torch.autograd.grad(total, used), torch.autograd.grad(expected, used))
    assert set(cublaslt_in_torch) == {name for name in ("bias", "products") if getattr(plan, name)}
    with torch.no_grad():
        assert torch.equal(linear(*used), out)


@pytest.mark.parametrize("order", [None, "value_gate"])
@pytest.mark.parametrize("level", [0, 2])
def test_compiles_to_one_graph(order: str | None, level: int) -> None:
    def network(x: Tensor, *rest: Tensor) -> Tensor:
        x, residual = linear(x * 2, torch.eye(K, dtype=x.dtype), return_residual=True, heuristic="tune")
        return call(order, x, *rest, checkpoint_lvl=level, heuristic=level) + residual.sum(-1, keepdim=True)

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        tensors = leaves(order)
        tensors[0] = torch.randn(rows, 4, K, dtype=FP64, requires_grad=True)
        out, expected = compiled(*tensors), network(*tensors)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))


def test_epilogues_compile_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of the compiled library, given an implementation for the CPU."""
    if library.load_error() is not None or not hasattr(torch.ops.flash_attn_kernels, "gemm_epilogue"):
        pytest.skip("no compiled library of flash-attn-kernels with this operator")

    def gemm_epilogue(
        a: Tensor, b: Tensor, bias: Tensor | None, aux: Tensor | None, number: int, algorithm: int
    ) -> tuple[Tensor, Tensor]:
        product = a @ b if bias is None else torch.addmm(bias, a, b)
        if number == gemm.Epilogue.GELU_AUX_BIAS:
            return F.gelu(product, approximate="tanh"), product
        if number == gemm.Epilogue.GELU_BIAS_GRADIENT:
            d_pre = torch.ops.aten.gelu_backward(product, aux, approximate="tanh")
            return d_pre, d_pre.sum(0)
        if number == gemm.Epilogue.BIAS_GRADIENT:
            return product, a.sum(1)
        assert number in (gemm.Epilogue.NONE, gemm.Epilogue.BIAS)
        return product, a.new_empty(0)

    monkeypatch.setattr(gemm, "_load", lambda: None)
    use_plan(monkeypatch, Plan(True, True, True, True))
    gemm._register_fake()
    with torch.library._scoped_library("flash_attn_kernels", "IMPL") as implementations:
        implementations.impl("gemm_epilogue", gemm_epilogue, "CPU")
        compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 7):
            tensors = leaves(None)
            tensors[0] = torch.randn(rows, 4, K, dtype=FP64, requires_grad=True)
            out, expected = compiled(*tensors), reference.mlp(*tensors, "gelu_tanh")
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(gradients(out, tensors), gradients(expected, tensors))


def test_autocast() -> None:
    tensors = leaves(None, FP32)
    with torch.autocast("cpu", dtype=BF16):
        out = mlp(*tensors)
        plain = linear(*tensors[:2])
        exact = mlp(*copies(tensors, FP64))
    assert out.dtype == BF16 and plain.dtype == BF16 and exact.dtype == FP64
    halves = copies(tensors, BF16)
    expected = mlp(*halves)
    assert torch.equal(out, expected)
    for actual, same in zip(gradients(out, tensors), gradients(expected, halves), strict=True):
        assert actual.dtype == FP32 and torch.equal(actual, same.float())


@pytest.mark.parametrize("order", [None, "gate_value"])
def test_no_tokens_and_strided(order: str | None) -> None:
    tensors = leaves(order)
    tensors[0] = torch.randn(0, K, dtype=FP64, requires_grad=True)
    out = call(order, *tensors)
    assert out.shape == (0, N)
    assert all(not gradient.any() for gradient in gradients(out, tensors))
    tensors = leaves(order)
    strided = [tensors[0].detach().transpose(0, 1), *(tensor.detach() for tensor in tensors[1:])]
    strided[1] = strided[1].t().contiguous().t()
    assert not strided[1].is_contiguous()
    for tensor in strided:
        tensor.requires_grad_()
    out = call(order, *strided)
    expected = reference.mlp(*strided, "gelu_tanh" if order is None else "silu", order)
    torch.testing.assert_close(out, expected)
    upstream = torch.ones(1, 1, 1, dtype=FP64).expand(out.shape)
    torch.testing.assert_close(
        torch.autograd.grad(out, strided, upstream), torch.autograd.grad(expected, strided, upstream)
    )
    assert call(
        order, torch.ones(2, 3, 0), torch.ones(H, 0), torch.ones(N, H if order is None else H // 2)
    ).shape == (2, 3, N)
    vector = tensors[0][0, 0].detach()
    assert call(order, vector, *tensors[1:]).shape == (N,)


def test_double_backward_is_an_error() -> None:
    tensors = leaves(None)
    (gradient,) = torch.autograd.grad(mlp(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


def test_every_option_acts() -> None:
    tensors = leaves("gate_value")
    first, second = (gated_mlp(*tensors, order=order) for order in ("gate_value", "value_gate"))
    assert not torch.equal(first, second) and torch.equal(second, gated_mlp(*tensors))
    assert not torch.equal(gated_mlp(*tensors, activation="gelu"), second)
    tensors = leaves(None)
    results = [mlp(*tensors, activation=activation) for activation in ACTIVATIONS]
    results += [mlp(*tensors[:4]), mlp(*tensors[:3], None, tensors[4])]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[i + 1 :])
    assert torch.equal(mlp(*tensors, activation="sqrelu"), mlp(*tensors, activation="squared_relu"))


def test_modules_are_the_functions() -> None:
    x = torch.randn(3, 16, dtype=FP64)
    dense = FusedDense(16, 5, dtype=FP64, return_residual=True)
    out, residual = dense(x)
    assert torch.equal(out, F.linear(x, dense.weight, dense.bias)) and torch.equal(residual, x)
    options = {"activation": "squared_relu", "checkpoint_lvl": 1, "return_residual": True, "heuristic": -1}
    module = FusedMLP(16, 24, 5, dtype=FP64, bias2=False, **options)
    assert list(module.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight"]
    expected = mlp(x, module.fc1.weight, module.fc2.weight, module.fc1.bias, **options)
    assert torch.equal(module(x)[0], expected[0]) and torch.equal(module(x)[1], x)
    gated = FusedGatedMLP(16, 24, multiple_of=32, order="gate_value", bias1=False, dtype=FP64)
    assert gated.fc1.weight.shape == (64, 16) and gated.fc2.weight.shape == (16, 32)
    expected = gated_mlp(x, gated.fc1.weight, gated.fc2.weight, None, gated.fc2.bias, order="gate_value")
    assert torch.equal(gated(x), expected)
    assert FusedMLP(16).fc1.weight.shape == (64, 16) and FusedGatedMLP(96).fc2.weight.shape == (96, 256)
    assert "squared_relu" in repr(module) and "gate_value" in repr(gated)
    state = torch.nn.Sequential(FusedDense(16, 5)).state_dict()
    torch.nn.Sequential(torch.nn.Linear(16, 5)).load_state_dict(state)


def test_meta_tensors() -> None:
    module = FusedMLP(16, device="meta")
    assert module(torch.empty(3, 16, device="meta")).shape == (3, 16)


X, W1, W2, B1, B2 = (torch.ones(shape) for shape in ((3, K), (H, K), (N, H), (H,), (N,)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: linear(X.long(), W1), r"x: got torch.int64; expected a floating-point dtype"),
        (lambda: linear(X.tolist(), W1), r"x: got list; expected a torch.Tensor"),
        (lambda: linear(torch.tensor(1.0), W1), r"x: got a scalar"),
        (lambda: linear(X, W1.t()), r"weight: got shape \(6, 8\); expected \(out features, 6\)"),
        (lambda: linear(None, W1), r"x: got None; expected a torch.Tensor"),
        (lambda: mlp(X, W1, None), r"weight2: got None; expected a torch.Tensor"),
        (lambda: linear(X, W1[0]), r"weight: got shape \(6,\)"),
        (lambda: linear(X, W1, B2), r"bias: got shape \(5,\); expected \(8,\)"),
        (lambda: linear(X, W1.double()), r"weight: got torch.float64; expected torch.float32.*autocast"),
        (lambda: linear(X, W1, B1.half()), r"bias: got torch.float16; expected torch.float32"),
        (lambda: linear(X, W1.to("meta")), r"weight: got a tensor on meta; expected cpu"),
        (lambda: linear(X, W1, heuristic="fast"), r"heuristic: got 'fast'; expected 'auto', 'tune', -1"),
        (lambda: mlp(X, W1, W2, heuristic=-2), r"heuristic: got -2"),
        (lambda: mlp(X, W1, W2, heuristic=True), r"heuristic: got True"),
        (lambda: mlp(X, W1, W2, checkpoint_lvl=3), r"checkpoint_lvl: got 3; expected 0, 1 or 2"),
        (lambda: mlp(X, W1, W2, activation="tanh"), r"activation: got 'tanh'"),
        (lambda: mlp(X, W1, W2.t()), r"weight2: got shape \(8, 5\); expected \(out features, 8\)"),
        (lambda: mlp(X, W1, W2, B2), r"bias1: got shape \(5,\); expected \(8,\)"),
        (lambda: mlp(X, W1, W2, B1, B1), r"bias2: got shape \(8,\); expected \(5,\)"),
        (lambda: gated_mlp(X, W1[:7], W2), r"weight1: got shape \(7, 6\); expected \(2H, K\)"),
        (lambda: gated_mlp(X, W1, W2), r"weight2: got shape \(5, 8\); expected \(out features, 4\)"),
        (lambda: gated_mlp(X, W1, W2, order="gate"), r"order: got 'gate'"),
        (lambda: FusedMLP(4, checkpoint_lvl=5), r"checkpoint_lvl: got 5"),
        (lambda: FusedMLP(4, activation="tanh"), r"activation: got 'tanh'"),
        (lambda: FusedGatedMLP(4, multiple_of=0), r"multiple_of: got 0"),
        (lambda: FusedGatedMLP(4, order="gate"), r"order: got 'gate'"),
        (lambda: FusedDense(4, 4, heuristic="fast"), r"heuristic: got 'fast'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_rejected_arguments(function: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        function()
    assert "Fix: " in str(error.value)
