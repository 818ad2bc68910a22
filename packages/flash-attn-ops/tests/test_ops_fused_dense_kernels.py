"""Dense layers with kernels and cuBLASLt epilogues against float64, plain torch being the measure of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels import gemm
from flash_attn_kernels.testing import assert_within_reference_error, captured
from flash_attn_ops.dispatch import explain
from flash_attn_ops.fused_dense import FusedMLP, functional, gated_mlp, linear, mlp, operators
from flash_attn_ops.fused_dense.plans import MlpProblem, Plan, plan_mlp
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
    tokens: int
    sizes: tuple[int, int, int]  # in, hidden, out
    activation: str
    order: str | None = None
    dtype: torch.dtype = BF16
    checkpoint_lvl: int = 0
    heuristic: int | str = "auto"
    biases: tuple[bool, bool] = (True, True)
    return_residual: bool = False

    @property
    def options(self) -> dict[str, Any]:
        names = ("activation", "checkpoint_lvl", "heuristic", "return_residual")
        gated = {} if self.order is None else {"order": self.order}
        return gated | {name: getattr(self, name) for name in names}


SMALL = [
    Case(21, (24, 40, 16), "gelu_tanh"),
    Case(21, (24, 40, 16), "gelu", checkpoint_lvl=1),
    Case(21, (24, 40, 16), "squared_relu", checkpoint_lvl=2),
    Case(7, (10, 33, 5), "relu", dtype=FP32, checkpoint_lvl=1),
    Case(7, (10, 33, 5), "silu", dtype=FP16, biases=(False, True)),
    Case(70, (24, 40, 16), "silu", "value_gate", return_residual=True),
    Case(70, (24, 40, 16), "gelu", "gate_value", checkpoint_lvl=1, biases=(True, False)),
    Case(7, (10, 33, 5), "sigmoid", "value_gate", FP32, checkpoint_lvl=2, biases=(False, False)),
]
SIZES, ODD = (512, 1024, 640), (520, 1032, 648)
LARGE = [
    *(
        Case(1000, sizes, activation, checkpoint_lvl=level, heuristic=heuristic)
        for activation in ("gelu_tanh", "relu")
        for sizes in (SIZES, ODD)
        for level in (0, 1, 2)
        for heuristic in (-1, 0)
    ),
    Case(999, SIZES, "gelu_tanh", dtype=FP16, heuristic=0),
    Case(999, SIZES, "relu", dtype=FP16, heuristic=0, return_residual=True),
    Case(1, SIZES, "gelu_tanh", heuristic=0),
    Case(1000, SIZES, "gelu_tanh", heuristic="tune"),
    Case(1000, SIZES, "gelu_tanh", heuristic=0, biases=(False, False)),
    Case(1000, SIZES, "gelu_tanh", heuristic=0, biases=(True, False)),
    Case(1000, (512, 1023, 640), "gelu_tanh", heuristic=0),
    Case(1000, SIZES, "squared_relu", heuristic=0),
    Case(1000, SIZES, "silu", "value_gate", heuristic=0),
    Case(1000, SIZES, "silu", "gate_value", heuristic="tune", return_residual=True),
    Case(999, ODD, "squared_relu", heuristic="tune", checkpoint_lvl=2, biases=(False, True)),
    Case(1000, SIZES, "gelu_tanh", dtype=FP32, heuristic=0),
]


def plain(case: Case, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
    """As a user writes it, every step rounded."""
    pre = F.linear(x, w1, b1)
    if case.order is None:
        return F.linear(TORCH[case.activation](pre), w2, b2)
    first, second = pre.chunk(2, dim=-1)
    gate, value = (first, second) if case.order == "gate_value" else (second, first)
    return F.linear(TORCH[case.activation](gate) * value, w2, b2)


def tensors_of(case: Case, device: str) -> list[Tensor | None]:
    """x, weights, biases; products have the size of 1."""
    k, h, n = case.sizes
    width = h if case.order is None else 2 * h
    shapes = ((case.tokens, k), (width, k), (n, h), (width,), (n,))
    scales = (1, k**-0.5, h**-0.5, 1, 1)
    given = (True, True, True, *case.biases)
    return [
        (torch.randn(shape, device=device) * scale).to(case.dtype) if there else None
        for shape, scale, there in zip(shapes, scales, given, strict=True)
    ]


def results_of(case: Case, function: Any, tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    used = [None if tensor is None else tensor.to(dtype).clone().requires_grad_() for tensor in tensors]
    out = function(*used)
    out, residual = out if isinstance(out, tuple) else (out, used[0] if case.return_residual else None)
    generator = torch.Generator().manual_seed(1)
    outputs = [out] if residual is None else [out, residual]
    upstream = [torch.randn(o.shape, generator=generator).to(o.device, case.dtype).to(dtype) for o in outputs]
    present = [tensor for tensor in used if tensor is not None]
    return [out, *torch.autograd.grad(outputs, present, upstream)]


def call(case: Case, *tensors: Tensor | None) -> Any:
    return (mlp if case.order is None else gated_mlp)(*tensors, **case.options)


def check(case: Case, device: str) -> None:
    tensors = tensors_of(case, device)
    assert explain(tensors[0]).path == "triton"
    ours = results_of(case, lambda *t: call(case, *t), tensors, case.dtype)
    exact = results_of(case, lambda *t: plain(case, *t), tensors, FP64)
    same = results_of(case, lambda *t: plain(case, *t), tensors, case.dtype)
    for index, (actual, reference, other) in enumerate(zip(ours, exact, same, strict=True)):
        # float32 sums over tokens in another order
        atol = 1e-5 + 1e-6 * case.tokens if case.dtype == FP32 else 1e-5
        assert_within_reference_error(
            actual, reference, other, factor=2.0 if index == 0 else 3.0, atol=atol, name=str(index)
        )
        assert actual.dtype == case.dtype


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen(frozen: int, device: str) -> None:
    """One tensor needs no gradient: the others get theirs."""
    case = Case(70, (24, 40, 16), "gelu", checkpoint_lvl=1)
    leaves = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(tensors_of(case, device))]
    used = [leaf for leaf in leaves if leaf.requires_grad]
    call(case, *leaves).sum().backward()
    some = [leaf.grad for leaf in used]
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    call(case, *leaves).sum().backward()
    assert all(torch.equal(first, second.grad) for first, second in zip(some, used, strict=True))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("shape", [(1, 1), (70, 40), (700, 300), (3, 1000), (0, 24), (5, 0)], ids=str)
def test_column_sums(shape: tuple[int, int], device: str) -> None:
    for dtype in (BF16, FP16, FP32):
        x = torch.randn(shape, device=device).to(dtype)
        atol = 1e-5 + 1e-6 * shape[0] if dtype == FP32 else 1e-5
        for given in (x, x.t().contiguous().t(), x[:1].expand(shape)):
            actual = operators.column_sums(given)
            assert_within_reference_error(actual, given.to(FP64).sum(0), given.sum(0), atol=atol)
            assert actual.dtype == dtype and actual.shape == shape[1:]


def test_column_sums_of_many_elements() -> None:
    x = torch.zeros(2**31 // 4096 + 300, 4096, device="cuda", dtype=BF16)
    x[-1] = torch.arange(4096, device="cuda") % 100
    assert torch.equal(operators.column_sums(x), x[-1])


def test_operator_keeps_its_word(device: str) -> None:
    torch.library.opcheck(torch.ops.flash_attn_ops.column_sums.default, (torch.randn(70, 40, device=device),))


def test_levels_give_the_same_bits(device: str) -> None:
    for order in (None, "value_gate"):
        results = []
        for level in (0, 1, 2):
            case = Case(70, (24, 40, 16), "silu", order, checkpoint_lvl=level)
            torch.manual_seed(0)
            results.append(
                results_of(case, lambda *t, c=case: call(c, *t), tensors_of(case, device), case.dtype)
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def problem_of(case: Case) -> MlpProblem:
    return MlpProblem(
        *(case.tokens, *case.sizes, case.dtype, "cuda", case.activation, case.order is not None),
        *(case.biases[0], case.checkpoint_lvl),
    )


def test_epilogues_are_used_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests above: heuristic 0 does run the operator, and -1 does not."""
    assert gemm.load_error() is None
    ran: list[str] = []
    for name in ("linear_act", "act_gradient", "weight_and_bias_gradient"):
        function = getattr(gemm, name)
        monkeypatch.setattr(
            gemm, name, lambda *a, f=function, n=name, **options: (ran.append(n), f(*a, **options))[1]
        )
    for heuristic, expected in ((-1, 0), (0, 3)):
        case = Case(256, SIZES, "gelu_tanh", heuristic=heuristic)
        ran.clear()
        results_of(case, lambda *t, c=case: call(c, *t), tensors_of(case, "cuda"), case.dtype)
        assert len(ran) == expected
        assert plan_mlp(problem_of(case), heuristic) == (Plan(True, True, True) if expected else Plan())


def test_auto_is_a_plan_that_works() -> None:
    for activation in ("gelu_tanh", "relu", "squared_relu"):
        check(Case(512, SIZES, activation, heuristic="auto"), "cuda")


def test_no_such_candidate() -> None:
    case = Case(256, SIZES, "gelu_tanh", heuristic=1000)
    with pytest.raises(RuntimeError, match="algorithm: got 1000"):
        call(case, *tensors_of(case, "cuda"))


@pytest.mark.parametrize("heuristic", [-1, 0, "tune"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_same_bits_twice(activation: str, heuristic: int | str) -> None:
    case = Case(4096, (1024, 4096, 1024), activation, heuristic=heuristic)
    tensors = tensors_of(case, "cuda")
    first, second = (results_of(case, lambda *t: call(case, *t), tensors, case.dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_linear_small(device: str) -> None:
    check_linear(Case(70, (24, 40, 16), "relu", return_residual=True), device, "auto")


@pytest.mark.parametrize("heuristic", [-1, 0, "tune"])
def test_linear(heuristic: int | str) -> None:
    check_linear(Case(1000, SIZES, "relu", return_residual=True), "cuda", heuristic)


def check_linear(case: Case, device: str, heuristic: int | str) -> None:
    tensors = [tensors_of(case, device)[index] for index in (0, 1, 3)]

    def ours(*t: Tensor) -> Any:
        return linear(*t, return_residual=True, heuristic=heuristic)

    results = [
        results_of(case, function, tensors, dtype)
        for function, dtype in ((ours, BF16), (F.linear, FP64), (F.linear, BF16))
    ]
    for actual, exact, same in zip(*results, strict=True):
        assert_within_reference_error(actual, exact, same, factor=3.0)


@pytest.mark.parametrize("heuristic", [-1, 0, "tune"])
def test_graph_replay(heuristic: int | str) -> None:
    """Captured once, replayed on other values; what is not timed yet is not timed during capture."""
    case = Case(256, (256, 1024, 256), "gelu_tanh", heuristic=heuristic)
    leaves = [tensor.requires_grad_() for tensor in tensors_of(case, "cuda")]
    d_out = torch.randn(case.tokens, case.sizes[2], device="cuda", dtype=BF16)

    def step() -> list[Tensor]:
        out = call(case, *leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    graph, results = captured(step, warmups=3)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_other_stream() -> None:
    case = Case(2048, (1024, 4096, 1024), "gelu_tanh", heuristic=0)
    tensors = tensors_of(case, "cuda")
    expected = call(case, *tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = tensors[0] * 2
        out = call(case, late * 0.5, *tensors[1:])
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("heuristic", [-1, 0])
@pytest.mark.parametrize("order", [None, "value_gate"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend: str, order: str | None, heuristic: int) -> None:
    torch._dynamo.reset()
    case = Case(256, SIZES, "gelu_tanh" if order is None else "silu", order, heuristic=heuristic)
    compiled = torch.compile(lambda *t: call(case, *t), fullgraph=True, dynamic=True, backend=backend)
    for tokens in (256, 384):
        tensors = tensors_of(Case(tokens, SIZES, case.activation, order), "cuda")
        actual = results_of(case, compiled, tensors, BF16)
        expected = results_of(case, lambda *t: call(case, *t), tensors, BF16)
        for first, second in zip(actual, expected, strict=True):
            error = (first.float() - second.float()).norm() / second.float().norm()
            assert error < 1e-2, error.item()  # inductor may take another algorithm for a product


def test_autocast_and_modules() -> None:
    module = FusedMLP(512, 1024, 512, heuristic=0, device="cuda")
    x = torch.randn(300, 512, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=BF16):
        out = module(x)
    out.sum().backward()
    assert out.dtype == BF16
    assert all(p.grad is not None and p.grad.dtype == FP32 for p in module.parameters())


def test_levels_keep_less_memory() -> None:
    kept = []
    for level in (0, 1, 2):
        case = Case(8192, (512, 8192, 512), "silu", checkpoint_lvl=level)
        leaves = [tensor.requires_grad_() for tensor in tensors_of(case, "cuda")]
        before = torch.cuda.memory_allocated()
        out = call(case, *leaves)
        kept.append(torch.cuda.memory_allocated() - before)
        del out
    activation_bytes = 2 * 8192 * 8192
    assert kept[0] - kept[1] == activation_bytes and kept[1] - kept[2] == activation_bytes


@pytest.mark.parametrize("heuristic", [-1, 0])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_more_than_2_to_the_31_elements(activation: str, heuristic: int) -> None:
    """The last rows and their gradients come out right."""
    case = Case(2**31 // 8192 + 128, (64, 8192, 64), activation, heuristic=heuristic)
    tensors = tensors_of(case, "cuda")
    x = tensors[0].requires_grad_()
    out = call(case, *tensors)
    d_out = torch.zeros_like(out)
    d_out[-128:] = torch.randn(128, 64, device="cuda")
    (d_x,) = torch.autograd.grad(out, x, d_out)
    results = []
    for dtype in (FP64, BF16):
        tail = [tensor.detach().to(dtype) for tensor in (x[-128:], *tensors[1:])]
        tail[0].requires_grad_()
        alone = plain(case, *tail)
        results.append((alone, *torch.autograd.grad(alone, tail[0], d_out[-128:].to(dtype))))
    for actual, exact, same in zip((out[-128:], d_x[-128:]), *results, strict=True):
        assert_within_reference_error(actual, exact, same, factor=3.0)
    assert not d_x[:-128].any()


def test_cpu_tensors_on_a_gpu_machine() -> None:
    case = Case(20, (16, 32, 16), "gelu_tanh", dtype=torch.bfloat16, heuristic=0)
    tensors = tensors_of(case, "cpu")
    assert (
        functional.plan_mlp(MlpProblem(20, 16, 32, 16, BF16, "cpu", "gelu_tanh", False, True, 0), 0) == Plan()
    )
    assert call(case, *tensors).shape == (20, 16)
