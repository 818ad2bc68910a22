"""The fused head with the cross-entropy kernels, against float64 and the head and loss by themselves; its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.dispatch import explain
from flash_attn_ops.linear_cross_entropy import choose_chunk_rows, linear_cross_entropy, triton_kernels
from torch import Tensor

pytestmark = pytest.mark.gpu

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@dataclass(frozen=True)
class Case:
    rows: int
    size: int
    classes: int
    dtype: torch.dtype = BF16
    bias: bool = False
    chunk_rows: int | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    accumulate_in_float32: bool = True

    @property
    def options(self) -> dict:
        names = (
            "chunk_rows",
            "reduction",
            "label_smoothing",
            "z_loss",
            "logit_scale",
            "accumulate_in_float32",
        )
        return {name: getattr(self, name) for name in names}


SMALL = [
    Case(20, 16, 300, chunk_rows=8),
    Case(20, 16, 301, chunk_rows=7, bias=True, label_smoothing=0.1, z_loss=0.01, dtype=FP32),
    Case(20, 16, 301, chunk_rows=7, bias=True, reduction="none", logit_scale=0.5),
    Case(9, 8, 1003, reduction="sum", accumulate_in_float32=False, chunk_rows=4),
    Case(20, 16, 301, bias=True),
    Case(12, 16, 40, reduction="sum"),
]
LARGE = [
    Case(2000, 512, 32000),
    Case(2000, 256, 50257, bias=True, chunk_rows=640, label_smoothing=0.1, z_loss=1e-4),
    Case(1000, 256, 131072, reduction="none", chunk_rows=384),
    Case(1000, 256, 50257, dtype=FP16, reduction="sum", chunk_rows=256),
    Case(500, 128, 9001, dtype=FP32, bias=True, chunk_rows=128),
    Case(1500, 256, 50257, bias=True, z_loss=1e-4),
    Case(1500, 256, 32000, reduction="sum"),
    Case(1500, 256, 32000, accumulate_in_float32=False, chunk_rows=512),
]


def plain(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias) * case.logit_scale
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=case.label_smoothing)
    losses = losses + (case.z_loss * logits.logsumexp(-1).square()).masked_fill(labels == -100, 0.0)
    if case.reduction == "none":
        return losses
    return losses.sum() if case.reduction == "sum" else losses.sum() / (labels != -100).sum()


def check(case: Case, device: str) -> None:
    shapes = [(case.rows, case.size), (case.classes, case.size), (case.classes,)]
    tensors = [(torch.randn(shape, device=device) * 0.5).to(case.dtype) for shape in shapes[: 2 + case.bias]]
    labels = torch.randint(0, case.classes, (case.rows,), device=device)
    labels[::3] = -100
    assert explain(tensors[0]).path == "triton"
    upstream = torch.rand(case.rows if case.reduction == "none" else (), device=device) + 0.5
    results = {}
    for name, dtype in (("ours", case.dtype), ("exact", torch.float64), ("same", case.dtype)):
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in tensors]
        hidden, weight, bias = (*leaves, None)[:3]
        if name == "ours":
            loss = linear_cross_entropy(hidden, weight, labels, bias, **case.options)
        else:
            loss = plain(case, hidden, weight, labels, bias)
        loss.backward(upstream.to(loss.dtype))
        results[name] = (loss, *(leaf.grad for leaf in leaves))
    for index, (ours, exact, same) in enumerate(zip(*results.values(), strict=True)):
        name = ("loss", "d_hidden", "d_weight", "d_bias")[index]
        scale = 1e-5 * max(1.0, exact.abs().max().item())
        assert_within_reference_error(ours, exact, same, factor=3.0 if index else 2.0, atol=scale, name=name)
        assert ours.dtype == (FP32 if index == 0 else case.dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction: str, device: str) -> None:
    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction, label_smoothing=0.1)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 12):
        tensors = [torch.randn(rows, 16, device=device), torch.randn(1000, 16, device=device)]
        labels = torch.randint(0, 1000, (rows,), device=device)
        results = []
        for function in (compiled, loss_of):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            loss = function(*leaves, labels)
            loss.sum().backward()
            results.append((loss, *(leaf.grad for leaf in leaves)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_operators_keep_their_word(wanted: tuple[bool, bool, bool], device: str) -> None:
    hidden, weight = torch.randn(6, 16, device=device).to(BF16), torch.randn(100, 16, device=device).to(BF16)
    bias, labels = torch.randn(100, device=device).to(BF16), torch.randint(0, 100, (6,), device=device)
    d_loss, how, options = torch.tensor(0.25, device=device), (True, 4, True), (0.1, 1.0, 1e-3, -100, 0, 100)
    operators = torch.ops.flash_attn_ops
    row_values = (torch.zeros(6, device=device), *torch.ones(2, 6, device=device))
    torch.library.opcheck(
        operators.linear_cross_entropy_forward.default,
        (hidden, weight, bias, labels, d_loss, *how, *wanted, *options),
    )
    torch.library.opcheck(
        operators.linear_cross_entropy_backward.default,
        (hidden, weight, bias, labels, *row_values, *how, *wanted, *options),
    )


def test_fp16_gradients_do_not_vanish(device: str) -> None:
    """Divided by the rows before the weight's gradient is summed, logits' gradients would be 33 times the smallest
    float16. The loss scale comes too late for that."""
    hidden, weight = torch.randn(256, 16, device=device), torch.zeros(2000, 16, device=device)
    labels = torch.full((256,), 7, device=device)
    gradients = []
    for dtype in (FP16, torch.float64):
        leaf = weight.to(dtype).requires_grad_()
        linear_cross_entropy(hidden.to(dtype), leaf, labels).mul(2.0**10).backward()
        gradients.append(leaf.grad[8:].double())
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 2e-3


@pytest.mark.parametrize("size", [0, 5, 4096, 2 * 8 * 4096 + 17])  # an interpreted GPU has 2 multiprocessors
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_multiplying_in_place(size: int, dtype: torch.dtype, device: str) -> None:
    values = torch.randn(size, device=device).to(dtype)
    for factor in (1.0, 0.3, -2.0, 0.0):
        product = values.clone()
        scale = torch.tensor(factor, device=device)
        triton_kernels.multiply_(product, scale)
        assert torch.equal(product, (values.float() * scale).to(dtype))


def test_multiplying_in_place_by_nan(device: str) -> None:
    product = torch.ones(5, device=device)
    triton_kernels.multiply_(product, torch.tensor(torch.nan, device=device))
    assert product.isnan().all()


def test_multiplying_more_than_2_to_the_31_in_place() -> None:
    values = torch.ones(2**31 + 4099, device="cuda", dtype=BF16)
    triton_kernels.multiply_(values, torch.tensor(3.0, device="cuda"))
    assert values.min() == values.max() == 3


def test_backward_again_is_the_first_again(device: str) -> None:
    leaves = [torch.randn(n, 16, device=device).to(BF16).requires_grad_() for n in (12, 301)]
    loss = linear_cross_entropy(*leaves, torch.randint(0, 301, (12,), device=device))
    factor = torch.tensor(0.7, device=device)
    once, again, last = (
        torch.autograd.grad(loss, leaves, factor, retain_graph=retain) for retain in (True, True, False)
    )
    for gradients in zip(once, again, last, strict=True):
        assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_peak_memory_of_one_chunk() -> None:
    """So many rows that the largest chunk of several would take as much: the logits, and each gradient once."""
    rows, size, classes = 16384 + 1024, 1024, 32000
    hidden = torch.randn(rows, size, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.randn(classes, size, device="cuda", dtype=BF16).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device="cuda")
    peaks = {}
    for chunk_rows in (None, None, 16384):  # in the first, cuBLAS takes its workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows).backward()
        peaks[chunk_rows] = torch.cuda.max_memory_allocated() - before
    assert peaks[None] < 1.02 * 2 * (rows * classes + classes * size + rows * size) + 2**22
    assert peaks[None] < 1.02 * peaks[16384] + 2**22


def test_peak_memory() -> None:
    """Beyond inputs and gradients: the logits of one chunk and the float32 sum of the weight's gradient."""
    rows, size, classes, chunk_rows = 8192, 1024, 32000, 1024
    hidden = torch.randn(rows, size, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.randn(classes, size, device="cuda", dtype=BF16).requires_grad_()
    labels = torch.randint(0, classes, (rows,), device="cuda")
    linear_cross_entropy(
        hidden, weight, labels, chunk_rows=chunk_rows
    ).backward()  # cuBLAS takes its workspace
    for reduction in ("mean", "none"):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(
            hidden, weight, labels, chunk_rows=chunk_rows, reduction=reduction
        ).sum().backward()
        extra = torch.cuda.max_memory_allocated() - before
        logits, weight_sum = 2 * chunk_rows * classes, 4 * classes * size
        gradients = 2 * (2 * rows * size) + 2 * classes * size  # hidden's before and after it is scaled
        assert extra < 1.05 * (logits + weight_sum + gradients) + 2**22
        assert extra < 2 * rows * classes, "the logits of all rows"


def test_same_bits_twice() -> None:
    case = replace(LARGE[1], rows=1500)
    hidden, weight = (torch.randn(n, case.size, device="cuda", dtype=BF16) for n in (case.rows, case.classes))
    labels = torch.randint(0, case.classes, (case.rows,), device="cuda")
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, chunk_rows=512)
        loss.backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_more_than_2_to_the_31_logits() -> None:
    """One chunk with so many: losses of the last rows are those by themselves."""
    rows, size, classes = 2**31 // 131072 + 9, 64, 131072
    hidden = torch.randn(rows, size, device="cuda", dtype=BF16)
    weight = torch.randn(classes, size, device="cuda", dtype=BF16)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    losses = linear_cross_entropy(hidden, weight, labels, chunk_rows=rows, reduction="none")
    expected = cross_entropy((hidden @ weight.t())[-12:], labels[-12:], reduction="none")
    assert_within_reference_error(losses[-12:], expected, expected, atol=1e-3)
    assert choose_chunk_rows(rows, classes, 2) < rows
