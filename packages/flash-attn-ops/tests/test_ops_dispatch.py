"""Which implementation runs, why, and who hears about it."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from flash_attn_ops import dispatch
from flash_attn_ops.activations import swiglu
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.dispatch import choose, explain, once_for_like_calls, runs_on_triton
from flash_attn_ops.fused_dense import linear, mlp
from flash_attn_ops.launch import ceil_div, next_power_of_2
from flash_attn_ops.library import once_differentiable
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from flash_attn_ops.norm import rms_norm
from flash_attn_ops.rotary import apply_rotary_emb
from flash_attn_ops.tensor_parallel import (
    ParallelFusedMLP,
    VocabParallelEmbedding,
    column_parallel_linear,
    row_parallel_linear,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

HALF = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("device_type", "dtypes", "capability", "installed", "interpreted", "path", "reason"),
    [
        ("cuda", HALF, (9, 0), True, False, "triton", "CUDA tensors"),
        ("cuda", HALF, (12, 0), True, False, "triton", "CUDA tensors"),
        ("cuda", HALF, None, True, False, "triton", "CUDA tensors"),
        ("cuda", HALF, (9, 0), False, False, "reference", "Triton is not installed"),
        ("cuda", HALF, (7, 5), True, False, "reference", "compute capability 7.5"),
        (
            "cuda",
            (torch.float32, torch.float64),
            (9, 0),
            True,
            False,
            "reference",
            "not enough for torch.float64",
        ),
        ("cpu", HALF, None, True, False, "reference", "tensors are on cpu"),
        ("cpu", HALF, None, True, True, "triton", "TRITON_INTERPRET=1"),
        ("cpu", (torch.float64,), None, True, True, "reference", "not enough for torch.float64"),
        ("cpu", HALF, None, False, True, "reference", "tensors are on cpu"),
        ("mps", HALF, None, True, False, "reference", "tensors are on mps"),
    ],
)
def test_choice(device_type, dtypes, capability, installed, interpreted, path, reason) -> None:
    choice = choose(device_type, dtypes, capability, triton_installed=installed, interpreted=interpreted)
    assert choice.path == path and reason in choice.reason


def test_explain_reads_the_tensors() -> None:
    assert explain(torch.ones(2), torch.ones(2).half()).path == "reference"


def test_a_cuda_tensor_on_the_slow_path_warns_once() -> None:
    tensor = mock.Mock(is_cuda=True, dtype=torch.float32, device=mock.Mock(type="cuda"))
    tensor.numel.return_value = 1
    with (
        mock.patch.object(dispatch, "TRITON_INSTALLED", False),
        mock.patch.object(dispatch, "_warned", set()),
        mock.patch.object(torch.version, "hip", "a device without a CUDA capability"),
        pytest.warns(UserWarning, match="rms_norm runs as plain torch operations: Triton is not installed"),
    ):
        assert not runs_on_triton("rms_norm", tensor, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not runs_on_triton("rms_norm", tensor, None)


def functions_of_tensors() -> None:
    """One call of each family, forward and backward, by torch's operations alone."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    square, labels = torch.randn(8, 8, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    table = torch.randn(4, 2)
    heads, boundaries = x.view(4, 2, 4), torch.zeros(3, dtype=torch.int32)
    losses = [
        rms_norm(x, weight).sum(),
        swiglu(x, x).sum(),
        apply_rotary_emb(heads, table, table, cu_seqlens=boundaries).sum(),
        apply_rotary_emb(heads, table, table, position_ids=labels).sum(),
        apply_rotary_emb(heads[None], table, table, seqlen_offsets=labels[:1]).sum(),
        cross_entropy(x, labels, z_loss=0.1),
        linear_cross_entropy(x, square, labels, chunk_rows=3),
        mlp(x, square, square).sum(),
        VocabParallelEmbedding(4, 8)(labels).sum(),
    ]
    sum(losses).backward()


def test_tensors_without_memory_are_taken_by_torch_alone() -> None:
    """Those of FakeTensorMode, or a DTensor: their address is 0, which a kernel would read from."""
    with FakeTensorMode():
        functions_of_tensors()
        fake = torch.empty(2)
    with (
        mock.patch.object(dispatch, "TRITON_INTERPRETS", True),
        mock.patch.object(dispatch, "TRITON_INSTALLED", True),
    ):
        choice = explain(fake)
        assert choice.path == "reference" and "FakeTensor has no memory of its own" in choice.reason
        assert explain(torch.empty(2)).path == explain(torch.nn.Parameter(torch.empty(2))).path == "triton"


def test_nothing_to_compute_launches_nothing() -> None:
    with mock.patch.object(dispatch, "TRITON_INTERPRETS", True):
        assert not runs_on_triton("rms_norm", torch.ones(0, 4), torch.ones(4))


def test_whole_numbers() -> None:
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1000, 1024)] == [1, 1, 2, 4, 4, 8, 1024, 1024]
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_like_calls_are_decided_once() -> None:
    decided = []

    @once_for_like_calls
    def decide(tensors: tuple, option: object) -> None:
        x, y = tensors
        decided.append((x.shape, None if y is None else y.dtype, option))
        if option == "refused":
            raise ValueError("refused")

    x = torch.zeros(2, 3)
    for _ in range(3):
        decide((x, None), 1)
        decide((x.clone(), None), 1)
    assert len(decided) == 1
    decide((x.t(), None), 1)
    decide((x, x), 1)
    decide((x, x.half()), 1)
    decide((x, x.to("meta")), 1)
    decide((x, None), 2)
    assert len(decided) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            decide((x, None), "refused")
        decide((x, None), [])  # which no table takes
    assert len(decided) == 10
    with mock.patch.object(dispatch, "TRITON_INTERPRETS", not dispatch.TRITON_INTERPRETS):
        decide((x, None), 1)
    assert len(decided) == 11
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        decide((x, None), 1)
    assert len(decided) == 12


def test_decisions_take_bounded_memory() -> None:
    @once_for_like_calls
    def decide(tensors: tuple) -> int:
        return tensors[0].shape[0]

    with mock.patch.object(dispatch, "MAX_REMEMBERED", 3):
        for size in (*range(10), *range(10)):
            assert decide((torch.empty(size),)) == size
    (known,) = [cell.cell_contents for cell in decide.__closure__ if isinstance(cell.cell_contents, dict)]
    assert len(known) <= 3


def test_a_tensor_may_be_two_arguments_of_a_compiled_function() -> None:
    """Which the compiler does not take from an autograd function."""

    def function(x: torch.Tensor, square: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = mlp(x, square, square, bias, bias)
        return column_parallel_linear(linear(x, x), square)

    tensors = [torch.randn(shape, requires_grad=True) for shape in ((4, 4), (4, 4), (4,))]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(out, expected)
    for ours, eager in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_a_backward_of_kernels_is_refused_a_backward() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @once_differentiable("doubling")
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(2, requires_grad=True)
    assert torch.equal(torch.autograd.grad(Double.apply(x).sum(), x)[0], torch.full((2,), 2.0))
    (gradient,) = torch.autograd.grad(Double.apply(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: linear(x, x.detach().requires_grad_()),
        lambda x: mlp(x, x.detach().requires_grad_(), x.detach()),
        lambda x: cross_entropy(x, torch.arange(4)),
        lambda x: linear_cross_entropy(x, x.detach().requires_grad_(), torch.arange(4)),
        lambda x: linear_cross_entropy(x, x.detach(), torch.arange(4), reduction="none"),
        lambda x: column_parallel_linear(x, x.detach().requires_grad_()),
        lambda x: row_parallel_linear(x, x.detach().requires_grad_()),
        lambda x: ParallelFusedMLP(4, checkpoint_lvl=1)(x),
    ],
)
def test_a_second_derivative_is_not_taken_for_zero(function) -> None:
    """Under a sum the upstream gradient is a constant, but the gradient is none: a penalty on it must not be lost."""
    x = torch.randn(4, 4, requires_grad=True)
    loss = function(x).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: linear(x, x.detach().requires_grad_()).sum(),
        lambda x: mlp(x, x.detach().requires_grad_(), x.detach()).sum(),
        lambda x: cross_entropy(x, torch.arange(4)),
        lambda x: linear_cross_entropy(x, x.detach(), torch.arange(4)).square(),
        lambda x: column_parallel_linear(x, x.detach().requires_grad_()).sum(),
        lambda x: row_parallel_linear(x, x.detach().requires_grad_()).sum(),
    ],
)
def test_hessians_are_refused(function) -> None:
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.functional.hessian(function, torch.randn(4, 4))


def test_a_graph_of_checkpointed_gradients() -> None:
    """Saved tensors are unpacked once, as checkpointing allows."""
    x, weight = torch.randn(2, 4, 4, requires_grad=True).unbind()
    out = checkpoint(linear, x, weight, use_reentrant=False)
    expected = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    found = torch.autograd.grad(out.sum(), (x, weight), create_graph=True)
    assert all(map(torch.equal, found, expected))
