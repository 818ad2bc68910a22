"""The fused head away from the GPU: against the head and the loss by themselves, memory, rejected arguments."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.cross_entropy.options import Options
from flash_attn_ops.linear_cross_entropy import (
    LinearCrossEntropyLoss,
    choose_chunk_rows,
    chunks,
    linear_cross_entropy,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LABELS = torch.tensor([3, -100, 0, 6, 2])
OPTIONS = [
    {},
    {"label_smoothing": 0.3},
    {"logit_scale": 0.4},
    {"z_loss": 0.2},
    {"ignore_index": 6},
    {"vocab_size": 7},
    {"label_smoothing": 1.0, "logit_scale": -1.5, "z_loss": 0.1},
]


def labels_for(options: dict) -> Tensor:
    return LABELS if options.get("ignore_index") is None else LABELS.clamp(min=0)


def given(dtype: torch.dtype = FP64, classes: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape).to(dtype) for shape in ((5, 4), (classes, 4), (classes,)))  # type: ignore[return-value]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_head_and_loss(options: dict, reduction: str, with_bias: bool) -> None:
    results = []
    for chunk_rows in (None, 1, 2, 7, "apart"):
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in GIVEN)
        every = {**options, "reduction": reduction, "return_z_loss": True}
        added = bias if with_bias else None
        if chunk_rows == "apart":
            logits = torch.nn.functional.linear(hidden, weight, added)
            loss, z_part = cross_entropy(logits, labels_for(options), **every)
        else:
            loss, z_part = linear_cross_entropy(
                hidden, weight, labels_for(options), added, chunk_rows=chunk_rows, **every
            )
        loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=FP64).view(loss.shape))
        results.append([loss, z_part, hidden.grad, weight.grad, *([bias.grad] if with_bias else [])])
        assert with_bias or bias.grad is None
    for result in results[:-1]:
        for ours, apart in zip(result, results[-1], strict=True):
            torch.testing.assert_close(ours, apart)


GIVEN = given()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in given()]
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "chunk_rows": 2, "reduction": reduction}
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, LABELS, bias, **options), leaves
    )


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_wanted_gradients(needs: tuple[bool, bool], reduction: str) -> None:
    hidden, weight, _ = given()
    leaves = [x.requires_grad_(need) for x, need in zip((hidden, weight), needs, strict=True)]
    loss = linear_cross_entropy(*leaves, LABELS, reduction=reduction).sum()
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    with torch.no_grad():
        assert not linear_cross_entropy(*leaves, LABELS).requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("accumulate_in_float32", [True, False])
def test_dtypes(dtype: torch.dtype, accumulate_in_float32: bool) -> None:
    """As far from float64 as the head and torch's loss in the same dtype, gradients to a factor of 3."""
    tensors = [(torch.randn(n) * 0.3).to(dtype) for n in ((64, 16), (50, 16), (50,))]
    labels = torch.randint(0, 50, (64,))
    results = []
    for precision, fused in ((dtype, True), (FP64, False), (dtype, False)):
        hidden, weight, bias = (tensor.to(precision).clone().requires_grad_() for tensor in tensors)
        if fused:
            how = {"chunk_rows": 16, "accumulate_in_float32": accumulate_in_float32}
            loss = linear_cross_entropy(hidden, weight, labels, bias, **how)
        else:
            loss = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels)
        (loss * 3).backward()
        results.append((loss, hidden.grad, weight.grad, bias.grad))
    for index, (ours, exact, plain) in enumerate(zip(*results, strict=True)):
        assert_within_reference_error(ours, exact, plain, factor=2.0 if index == 0 else 3.0)
        assert ours.dtype == (FP32 if index == 0 else dtype)


def test_summing_in_float32_acts() -> None:
    hidden, labels = torch.randn(512, 8).to(BF16), torch.randint(0, 5, (512,))
    gradients = []
    for in_float32 in (True, False):
        weight = torch.zeros(5, 8, dtype=BF16, requires_grad=True)
        how = {"chunk_rows": 4, "accumulate_in_float32": in_float32}
        linear_cross_entropy(hidden, weight, labels, **how).backward()
        gradients.append(weight.grad)
    exact = torch.zeros(5, 8, dtype=FP64, requires_grad=True)
    linear_cross_entropy(hidden.double(), exact, labels).backward()
    errors = [(gradient.double() - exact.grad).norm() for gradient in gradients]
    assert errors[0] < 0.5 * errors[1]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_a_chunk_of_logits_exists(reduction: str) -> None:
    rows, classes, size, chunk_rows = 64, 200, 4, 8
    hidden = torch.randn(rows, size, requires_grad=True)
    weight = torch.randn(classes, size, requires_grad=True)
    labels = torch.randint(0, classes, (rows,))
    with Largest() as fused:
        linear_cross_entropy(
            hidden, weight, labels, chunk_rows=chunk_rows, reduction=reduction
        ).sum().backward()
    assert fused.elements == chunk_rows * classes
    with Largest() as apart:
        cross_entropy(hidden @ weight.t(), labels).backward()
    assert apart.elements == rows * classes


@pytest.mark.parametrize("rows", [64, 65])
def test_memory_decides_on_one_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 64 rows and the result take the memory of one of 48 rows and the sum."""
    monkeypatch.setattr(chunks, "TILE_ROWS", 16)
    monkeypatch.setattr(chunks, "SUMMED_ROWS", 48)
    products = []
    add_product = chunks._add_product

    def spy(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        if a.dtype == BF16:  # on a CPU there is a call within the call, in float32
            products.append((a.shape[1], dtype))
        return add_product(total, a, b, dtype)

    monkeypatch.setattr(chunks, "_add_product", spy)
    hidden, weight = torch.randn(rows, 16).to(BF16), torch.randn(200, 16).to(BF16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.randint(0, 200, (rows,))).backward()
    assert products == ([(64, BF16)] if rows == 64 else [(48, FP32), (17, FP32)])
    assert weight.grad.dtype == BF16


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_padded_classes_take_no_part(
    with_bias: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products get 64 classes for 9; of those that are not there neither the results nor rows with NaN notice."""
    products = []
    matmul = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: products.append(a.shape) or matmul(a, b, **out))
    results = []
    labels = torch.tensor([3, -100, 0, 6, 2])
    for alignment in (16, 1):
        monkeypatch.setattr(chunks, "ALIGNED_BYTES", alignment)
        hidden, weight, bias = (tensor.clone() for tensor in GIVEN)
        hidden[1] = torch.nan
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
        loss = linear_cross_entropy(*leaves[:2], labels, bias if with_bias else None, reduction=reduction)
        loss.sum().backward()
        results.append((loss, hidden.grad, *([bias.grad] if with_bias else [])))
        assert weight.grad.shape == weight.shape and weight.grad.is_contiguous()
        assert weight.grad.isnan().all()  # 0 * NaN, as of a linear layer
    for padded, exact in zip(*results, strict=True):
        assert padded.shape == exact.shape and not padded.isnan().any()
        torch.testing.assert_close(padded, exact)
    assert {shape[1] for shape in products if shape[0] == 5} >= {9, 64}


def test_rows_of_logits_begin_on_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    to_gradient = chunks._gradient_
    monkeypatch.setattr(
        chunks, "_gradient_", lambda logits, *args: (seen.append(logits.stride()), to_gradient(logits, *args))
    )
    hidden = torch.randn(5, 4).requires_grad_()
    for classes in (8, 9, 100):
        linear_cross_entropy(hidden, torch.randn(classes, 4), LABELS, chunk_rows=4)
    assert seen == [stride for stride in [(8, 1), (64, 1), (100, 1)] for _ in range(2)]


def test_chunks_are_chosen_from_sizes() -> None:
    assert choose_chunk_rows(8192, 131072, 2) == 4096  # 1 GiB
    assert choose_chunk_rows(8192, 131072, 4) == 2048
    assert choose_chunk_rows(8193, 131072, 2) == 2816  # three even ones
    assert choose_chunk_rows(100000, 32000, 2) == 4096
    assert choose_chunk_rows(1000, 32000, 2) == 1000
    assert choose_chunk_rows(0, 32000, 2) == 1
    assert choose_chunk_rows(10**6, 10**9, 2) == 128
    # A sum of the weight's gradient, for hidden size 4096: the rows that take its memory go into the one chunk.
    assert choose_chunk_rows(20480, 32000, 2, 4096) == 20480
    assert choose_chunk_rows(20481, 32000, 2, 4096) == 10368
    assert choose_chunk_rows(20480, 32000, 2, 0) == 10240
    assert choose_chunk_rows(10**5, 32000, 2, 4096) == 14336  # 7 chunks
    assert choose_chunk_rows(12288, 128256, 2, 4096) == 12288
    assert choose_chunk_rows(16384, 128256, 2, 4096) == 8192  # 2 GiB
    assert choose_chunk_rows(16384, 262144, 2, 2048) == 4096
    for rows in range(1, 20000, 777):
        assert 0 <= -rows % choose_chunk_rows(rows, 200000, 2) < choose_chunk_rows(rows, 200000, 2) <= 2688


def test_ranks_of_uneven_vocabularies_take_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reduce chunk by chunk: ranks that cut rows elsewhere would wait for each other for ever."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 40 * 4)

    class TwoRanks:
        def size(self) -> int:
            return 2

    rows = []
    for classes in (40, 41):  # of which 128 rows fit, and do not
        seen: list[int] = []

        def no_losses(logits: Tensor, *_: object, seen: list[int] = seen) -> tuple[Tensor, ...]:
            seen.append(len(logits))
            return (logits.new_zeros(len(logits)),) * 3

        monkeypatch.setattr(chunks, "losses_of_rows", no_losses)
        monkeypatch.setattr(chunks, "TILE_ROWS", 1)
        chunks.forward(
            *(torch.randn(126, 3), torch.randn(classes, 3), None, torch.zeros(126, dtype=torch.int64)),
            *(Options(0.0, 1.0, 0.0, -100, 41 * (classes == 40), 81), (False, False, False)),
            d_loss=None,
            on_triton=False,
            chunk_rows=None,
            accumulate_in_float32=True,
            process_group=TwoRanks(),  # type: ignore[arg-type]
        )
        rows.append(seen)
    assert rows == [[63, 63], [63, 63]]


def test_leading_dimensions_and_empty_input() -> None:
    hidden, weight, _ = given()
    labels = torch.stack([LABELS, LABELS.flip(0)])
    both = torch.stack([hidden, hidden.flip(0)])
    out = linear_cross_entropy(both, weight, labels, reduction="none")
    assert torch.equal(out[1], out[0].flip(0)) and out.shape == (2, 5)
    for rows in (0, 5):
        leaves = [hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, torch.full((rows,), -100))
        loss.backward()
        assert loss.isnan() and not any(leaf.grad.any() for leaf in leaves)
        assert linear_cross_entropy(*leaves, torch.full((rows,), -100), reduction="sum") == 0


def test_strided_tensors() -> None:
    hidden, weight, _ = given()
    spread = torch.randn(5, 8, dtype=FP64)
    spread[:, ::2] = hidden
    expected = linear_cross_entropy(hidden, weight, LABELS)
    strided = linear_cross_entropy(spread[:, ::2], weight.t().contiguous().t(), LABELS)
    torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_backward_again_is_the_first_again(dtype: torch.dtype) -> None:
    leaves = [tensor.requires_grad_() for tensor in given(dtype)]
    loss = linear_cross_entropy(*leaves[:2], LABELS, leaves[2])
    times = [
        torch.autograd.grad(loss, leaves, torch.tensor(factor, dtype=loss.dtype), retain_graph=retain)
        for factor, retain in ((0.7, True), (1.0, True), (0.7, True), (0.7, False))
    ]
    for first, other, third, last in zip(*times, strict=True):
        assert torch.equal(first, third) and torch.equal(first, last)
        torch.testing.assert_close(first, other * 0.7)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_last_backward_makes_no_more_gradients() -> None:
    """It multiplies those of the forward in place."""
    hidden, weight, _ = (tensor.requires_grad_() for tensor in given())
    loss = linear_cross_entropy(hidden, weight, LABELS)
    kept = [tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors if tensor is not None][1:]
    loss.backward(torch.tensor(0.5, dtype=FP64), retain_graph=True)
    assert not {hidden.grad.data_ptr(), weight.grad.data_ptr()} & set(kept)
    hidden.grad = weight.grad = None
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == kept


def test_autocast_is_that_of_a_linear_layer() -> None:
    hidden, weight, bias = (tensor.requires_grad_() for tensor in given(FP32))
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_cross_entropy(hidden, weight, LABELS, bias)
        expected = cross_entropy(torch.nn.functional.linear(hidden, weight, bias), LABELS)
    assert torch.equal(loss, expected)
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == FP32


def test_autocast_leaves_the_sum_over_chunks_in_float32() -> None:
    hidden, weight, bias = (tensor.requires_grad_() for tensor in given(FP32))
    gradients = []
    for autocast in (True, False):
        leaves = [tensor.to(FP32 if autocast else BF16) for tensor in (hidden, weight, bias)]
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            loss = linear_cross_entropy(leaves[0], leaves[1], LABELS, leaves[2], chunk_rows=2)
            gradients.append(torch.autograd.grad(loss, (hidden, weight, bias)))  # within autocast too
    assert all(torch.equal(ours, outside) for ours, outside in zip(*gradients, strict=True))


def test_meta_tensors() -> None:
    hidden, weight, bias = (tensor.to("meta").requires_grad_() for tensor in given(FP32))
    loss = linear_cross_entropy(hidden, weight, LABELS.to("meta"), bias, reduction="none", chunk_rows=2)
    loss.sum().backward()
    assert loss.shape == LABELS.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_to_one_graph(reduction: str) -> None:
    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, bias, reduction=reduction, z_loss=0.1)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        results = []
        torch.manual_seed(rows)
        tensors = given(FP32)
        for function in (compiled, loss_of):
            hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors)
            loss = function(hidden[:rows], weight, bias, LABELS[:rows])
            loss.sum().backward()
            results.append((loss, hidden.grad, weight.grad, bias.grad))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_operators_keep_their_word(wanted: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias = given(BF16)
    options = (0.1, 1.0, 1e-3, -100, 0, 9)
    how, d_loss = (False, 2, True), torch.tensor(0.25)
    operators = torch.ops.flash_attn_ops
    row_values = (torch.zeros(5), torch.ones(5), torch.ones(5))
    torch.library.opcheck(
        operators.linear_cross_entropy_forward.default,
        (hidden, weight, bias, LABELS, d_loss, *how, *wanted, *options),
    )
    torch.library.opcheck(
        operators.linear_cross_entropy_backward.default,
        (hidden, weight, bias, LABELS, *row_values, *how, *wanted, *options),
    )


def test_module_is_the_function() -> None:
    hidden, weight, bias = given()
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum", "chunk_rows": 2, "vocab_size": 8}
    loss = LinearCrossEntropyLoss(**options)
    assert torch.equal(
        loss(hidden, weight, LABELS, bias), linear_cross_entropy(hidden, weight, LABELS, bias, **options)
    )
    assert "chunk_rows=2" in repr(loss)


HIDDEN, WEIGHT = torch.ones(5, 4), torch.ones(9, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN.long()}, r"hidden: got torch.int64; expected a floating-point dtype"),
        (
            {"hidden": torch.ones(5, 3)},
            r"hidden: got shape \(5, 3\); expected \(\.\.\., 4\), as weight has it",
        ),
        ({"weight": torch.ones(0, 4)}, r"weight: got shape \(0, 4\); expected \(V, E\) with V >= 1"),
        ({"hidden": None}, r"hidden: got None; expected a torch.Tensor"),
        ({"weight": None}, r"weight: got None; expected a torch.Tensor"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, r"logit_scale: got Tensor; .*no gradient"),
        ({"chunk_rows": 2.0}, r"chunk_rows: got 2.0; expected a positive number of rows"),
        ({"process_group": "tp"}, r"process_group: got str; expected a ProcessGroup"),
        ({"weight": WEIGHT[0]}, r"weight: got shape \(4,\)"),
        (
            {"weight": WEIGHT.double()},
            r"weight: got torch.float64; expected torch.float32, the dtype of hidden",
        ),
        ({"weight": WEIGHT.to("meta")}, r"weight: got a tensor on meta"),
        ({"bias": torch.ones(8)}, r"bias: got shape \(8,\); expected \(9,\), one value for each class"),
        ({"bias": torch.ones(9).double()}, r"bias: got torch.float64"),
        ({"labels": LABELS.int()}, r"labels: got torch.int32"),
        ({"labels": LABELS[:4]}, r"labels: got shape \(4,\)"),
        ({"labels": LABELS + 7}, r"labels: got 10 in row 0"),
        ({"reduction": "avg"}, r"reduction: got 'avg'"),
        ({"label_smoothing": -1.0}, r"label_smoothing: got -1.0"),
        ({"chunk_rows": 0}, r"chunk_rows: got 0; expected a positive number"),
        ({"vocab_size": 10}, r"vocab_size: got 10"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejected_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **change})
    assert "Fix: " in str(error.value)
