"""The cross-entropy kernels against float64, with plain torch in the same dtype as the measure of error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.cross_entropy import cross_entropy, reference
from flash_attn_ops.cross_entropy.options import Options
from flash_attn_ops.dispatch import explain
from torch import Tensor

triton_kernels = pytest.importorskip("flash_attn_ops.cross_entropy.triton_kernels", reason="needs Triton")
pytestmark = pytest.mark.gpu

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    dtype: torch.dtype = BF16
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    z_loss: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    inplace_backward: bool = False
    row_stride: int | None = None  # of logits, where not the number of classes

    @property
    def options(self) -> dict:
        names = ("rows", "classes", "dtype", "row_stride")
        return {name: value for name, value in vars(self).items() if name not in names}


SMALL = [
    Case(7, 64),
    Case(7, 1000, dtype=FP32, label_smoothing=0.1, logit_scale=0.7, z_loss=0.01),
    Case(5, 1, dtype=FP32, z_loss=0.1),
    Case(3, 4097, label_smoothing=0.2, reduction="sum"),
    Case(3, 9000, dtype=FP32, reduction="none", inplace_backward=True),
    Case(9, 300, dtype=FP16, ignore_index=0, reduction="none", logit_scale=-2.0),
    Case(9, 304, z_loss=1e-3, inplace_backward=True, label_smoothing=1.0),
    Case(9, 5, label_smoothing=0.1),  # rows of less than 16 bytes, which begin anywhere
    Case(9, 13, dtype=FP32, inplace_backward=True),
    Case(17, 1001, label_smoothing=0.1, inplace_backward=True),
    Case(5, 1003, row_stride=1008, inplace_backward=True),
    Case(5, 1000, row_stride=1003, label_smoothing=0.1),
    Case(5, 1003, row_stride=1005, dtype=FP32),
]
LARGE = [
    Case(1021, 32000, inplace_backward=True),
    Case(517, 50257, label_smoothing=0.1, z_loss=1e-4),
    Case(517, 50257, inplace_backward=True),
    Case(517, 50257, row_stride=50304, inplace_backward=True),
    Case(33, 151669, dtype=FP16, z_loss=1e-4, reduction="sum"),
    Case(259, 131072, reduction="none", inplace_backward=True),
    Case(33, 256000, dtype=FP32, logit_scale=0.5, reduction="sum"),
]


def plain(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    """torch's own cross-entropy plus the z-loss."""
    scaled = logits * case.logit_scale
    ignored = labels == case.ignore_index
    losses = F.cross_entropy(
        scaled, labels, reduction="none", label_smoothing=case.label_smoothing, ignore_index=case.ignore_index
    )
    losses = losses + (case.z_loss * scaled.logsumexp(-1).square()).masked_fill(ignored, 0.0)
    if case.reduction == "none":
        return losses
    return losses.sum() if case.reduction == "sum" else losses.sum() / (~ignored).sum()


class Spaced(torch.autograd.Function):
    """A copy whose rows are ``stride`` apart, with NaN between them."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: int) -> Tensor:
        return x.new_full((len(x), stride), float("nan"))[:, : x.shape[1]].copy_(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clone(), None


def check(case: Case, device: str) -> None:
    stride = case.row_stride or case.classes
    logits = (torch.randn(case.rows, stride, device=device) * 3).to(case.dtype)[:, : case.classes]
    labels = torch.randint(0, case.classes, (case.rows,), device=device)
    labels[::3] = case.ignore_index
    assert explain(logits).path == "triton"
    upstream = torch.randn(case.rows if case.reduction == "none" else (), device=device)
    results = {}
    for name, dtype in (("ours", case.dtype), ("exact", torch.float64), ("same", case.dtype)):
        leaf = logits.detach().to(dtype).requires_grad_()
        hidden = Spaced.apply(leaf, stride)  # what an in-place backward may overwrite
        loss = (
            cross_entropy(hidden, labels, **case.options) if name == "ours" else plain(case, hidden, labels)
        )
        loss.backward(upstream.to(loss.dtype))
        results[name] = {"loss": loss, "d_logits": leaf.grad, "overwritten": torch.equal(hidden, leaf.grad)}
    last_places = 4 * torch.finfo(FP32).eps * results["exact"]["loss"].abs().max().item()
    for name, factor, atol in (("loss", 2.0, max(1e-5, last_places)), ("d_logits", 3.0, 1e-5)):
        ours, exact, same = (results[which][name] for which in ("ours", "exact", "same"))
        assert_within_reference_error(ours, exact, same, factor=factor, atol=atol, name=name)
    assert results["ours"]["loss"].dtype == FP32 and results["ours"]["d_logits"].dtype == case.dtype
    assert results["ours"]["overwritten"] == case.inplace_backward


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


def test_every_row_ignored(device: str) -> None:
    labels = torch.full((4,), -100, device=device)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        logits = torch.randn(4, 10, device=device, requires_grad=True)
        loss = cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(
            loss.detach().cpu(), torch.tensor(expected), equal_nan=True, rtol=0, atol=0
        )
        loss.backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_rows_may_hold_anything(device: str) -> None:
    logits = torch.randn(3, 10, device=device)
    logits[1] = float("nan")
    labels = torch.tensor([2, -100, 3], device=device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, labels)
    loss.backward()
    assert (
        loss.isfinite()
        and torch.equal(leaf.grad[1], torch.zeros(10, device=device))
        and leaf.grad.isfinite().all()
    )


def test_infinite_logits(device: str) -> None:
    """-inf is a class that cannot be: the others share the probability."""
    logits = torch.randn(2, 5000, device=device)
    logits[:, :4500] = -float("inf")  # the first block of the online softmax sees nothing else
    leaf, exact, same = (logits.to(dtype).clone().requires_grad_() for dtype in (FP32, torch.float64, FP32))
    labels = torch.tensor([4600, 4999], device=device)
    losses = [cross_entropy(leaf, labels), F.cross_entropy(exact, labels), F.cross_entropy(same, labels)]
    for loss in losses:
        loss.backward()
    assert_within_reference_error(*losses)
    assert_within_reference_error(leaf.grad, exact.grad, same.grad, factor=3.0)
    hopeless = cross_entropy(logits, torch.tensor([0, 4999], device=device), reduction="none")
    assert hopeless[0] == float("inf") and hopeless[1].isfinite()


def test_labels_out_of_range_give_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn_ops import cross_entropy as module

    monkeypatch.setattr(module, "check_labels", lambda *_: None)  # a GPU's host does not read the labels
    logits = torch.randn(4, 10, device=device, requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([3, 10, -1, 9], device=device), reduction="none")
    losses.sum().backward()
    wrong = torch.tensor([False, True, True, False], device=device)
    assert torch.equal(losses.isnan(), wrong) and torch.equal(logits.grad.isnan().all(1), wrong)


def test_strided_logits(device: str) -> None:
    """A padded vocabulary sliced off, transposed logits, expanded upstream gradients."""
    labels = torch.tensor([1, 0, 7, -100], device=device)
    for x in (torch.randn(4, 16, device=device)[:, :9], torch.randn(9, 4, device=device).t()):
        leaf, copy = x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()
        cross_entropy(leaf, labels, reduction="none").sum().backward()
        cross_entropy(copy, labels, reduction="none").backward(torch.ones(4, device=device))
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_in_place_on_a_slice_leaves_the_padding(device: str) -> None:
    padded = torch.randn(4, 16, device=device)
    before = padded.clone()
    logits = padded[:, :9].detach().requires_grad_()
    labels = torch.tensor([1, 0, 7, -100], device=device)
    cross_entropy(logits, labels, inplace_backward=True).backward()
    assert torch.equal(padded[:, 9:], before[:, 9:]) and torch.equal(padded[:, :9], logits.grad)


def test_second_backward_in_place_is_an_error(device: str) -> None:
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    labels = torch.tensor([1, 0, 7, 2], device=device)
    loss = cross_entropy(logits, labels, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


def test_other_users_of_the_overwritten_logits_find_out(device: str) -> None:
    leaf = torch.randn(4, 9, device=device, requires_grad=True)
    logits = leaf * 1
    square = logits.square().sum()
    cross_entropy(logits, torch.tensor([1, 0, 7, 2], device=device), inplace_backward=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def options_of(classes: int, **changes: float) -> Options:
    defaults = {"label_smoothing": 0.0, "logit_scale": 1.0, "z_loss": 0.0, "ignore_index": -100}
    return Options(**{**defaults, "class_start": 0, "num_classes": classes, **changes})


SHARDS = [  # columns, and the options
    (300, options_of(300, label_smoothing=0.1, logit_scale=0.5, z_loss=0.01)),
    (300, options_of(1000, class_start=300, label_smoothing=0.1)),
    (301, options_of(500, class_start=301)),  # padding from column 199 on
    (304, options_of(300, class_start=304, label_smoothing=0.1)),  # nothing but padding
]


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize(("columns", "options"), SHARDS, ids=str)
def test_columns_of_one_process(columns: int, options: Options, given_lse: bool, device: str) -> None:
    """Statistics and gradient of a part of the classes, by kernel and by reference."""
    logits = torch.randn(40, columns, device=device)
    labels = torch.randint(0, options.num_classes, (40,), device=device)
    labels[3], labels[5] = -100, options.num_classes
    lse = torch.randn(40, device=device) + 7
    given = lse if given_lse else None
    ours = triton_kernels.statistics(logits, labels, given, options)
    expected = reference.statistics(logits, labels, given, options)
    exact = reference.statistics(logits.double(), labels, None if given is None else given.double(), options)
    for name, kernel, plain_result, truth in list(
        zip(("maximum", "total", "target"), ours, expected, exact, strict=True)
    )[2 * given_lse :]:
        undefined = truth.isnan()
        assert torch.equal(kernel.isnan(), undefined), name
        assert_within_reference_error(
            kernel[~undefined], truth[~undefined], plain_result[~undefined], name=name
        )
    d_loss, row = torch.randn(40, device=device), (labels, lse, torch.zeros_like(lse))
    padded = options.columns_that_count(columns)
    before = logits.clone()
    for inplace in (False, True):
        gradient = triton_kernels.d_logits(logits, *row, d_loss, None, options, inplace=inplace)
        truth = reference.d_logits(
            d_loss.double(), before.double(), labels, lse.double(), row[2].double(), options
        )
        plain_gradient = reference.d_logits(d_loss, before, *row, options)
        assert torch.equal(gradient[5, :padded].isnan(), truth[5, :padded].isnan())
        keep = labels != options.num_classes
        assert_within_reference_error(gradient[keep], truth[keep], plain_gradient[keep], factor=3.0)
        assert not gradient[:, padded:].any()
        assert torch.equal(logits, before) != inplace or not before.numel()


@pytest.mark.parametrize("columns", [304, 5, 4097, 9001])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_losses_with_their_gradient_are_those_apart(columns: int, dtype: torch.dtype, device: str) -> None:
    """The same bits from the kernel that does both."""
    options = options_of(max(columns - 2, 1), label_smoothing=0.1, z_loss=0.01, logit_scale=0.7)
    logits = torch.randn(9, columns, device=device).to(dtype)
    labels = torch.randint(0, options.num_classes, (9,), device=device)
    labels[1], labels[2] = -100, options.num_classes
    loss, maximum, log_total = triton_kernels.losses(logits, labels, None, options)
    one = torch.ones((), device=device)
    gradient = triton_kernels.d_logits(logits, labels, maximum, log_total, one, None, options, inplace=False)
    together = triton_kernels.losses_and_gradient_(logits, labels, options)
    tight = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}  # rows are summed in another order
    for ours, apart in zip(together, (loss, maximum, log_total), strict=True):
        torch.testing.assert_close(ours, apart, **tight)
    spacing = {"rtol": 2e-3, "atol": 1e-6, "equal_nan": True} if dtype == FP16 else tight
    torch.testing.assert_close(logits, gradient, **spacing)
    assert not logits[:, options.num_classes :].any()


@pytest.mark.parametrize("rows", [1, 200, 9000, 2**15 + 3])
def test_mean(rows: int, device: str) -> None:
    """One program up to some number of rows; NaN and rows that do not count are kept apart."""
    losses, labels = torch.randn(rows, device=device), torch.randint(0, 3, (rows,), device=device)
    labels[0], losses[labels == 2] = 1, 0.0  # as the loss of an ignored row is
    mean, count = triton_kernels.mean(losses, labels, 2)
    kept = losses[labels != 2]
    assert_within_reference_error(mean, kept.double().mean(), kept.mean(), atol=1e-6)
    assert count.item() == len(kept)
    torch.library.opcheck(torch.ops.flash_attn_ops.cross_entropy_mean.default, (losses, labels, 2))
    losses[0] = float("nan")
    assert triton_kernels.mean(losses, labels, 2)[0].isnan()


def test_given_log_sum_exp(device: str) -> None:
    logits, labels = torch.randn(6, 1003, device=device), torch.arange(6, device=device)
    labels[2] = -100
    for options in ({}, {"label_smoothing": 0.1, "logit_scale": 0.5, "z_loss": 0.1}):
        lse = (logits * options.get("logit_scale", 1.0)).logsumexp(-1)
        results = []
        for given in (None, lse):
            leaf = logits.clone().requires_grad_()
            loss, z_part = cross_entropy(leaf, labels, precomputed_lse=given, return_z_loss=True, **options)
            loss.backward()
            results.append((loss, z_part, leaf.grad))
        for ours, computed in zip(*results, strict=True):
            torch.testing.assert_close(ours, computed)
        wrong = cross_entropy(logits, labels, precomputed_lse=lse + 1, **options)
        assert not torch.isclose(wrong, results[0][0])


def test_padded_vocabulary(device: str) -> None:
    padded = torch.randn(5, 1010, device=device)
    padded[:, 1001:] = float("nan")
    labels = torch.arange(996, 1001, device=device)
    for inplace_backward in (False, True):
        options = {"label_smoothing": 0.1, "inplace_backward": inplace_backward}
        leaf, exact = padded.clone().requires_grad_(), padded[:, :1001].clone().requires_grad_()
        loss = cross_entropy(leaf * 1, labels, vocab_size=1001, **options)
        expected = cross_entropy(exact * 1, labels, **options)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad[:, :1001], exact.grad)
        assert not leaf.grad[:, 1001:].any()


def test_large_logits(device: str) -> None:
    """The digits behind a large maximum survive, forward and backward."""
    logits = torch.tensor([[1e4, 0.0, 1e4]], device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0], device=device))
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.6931471805599453)
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[-0.5, 0.0, 0.5]]))


def test_labels_are_validated_on_request(device: str) -> None:
    logits, labels = torch.randn(3, 10, device=device), torch.tensor([3, 10, -100], device=device)
    with pytest.raises(ValueError, match="labels: got 10 in row 1, the first of 1 out of range"):
        cross_entropy(logits, labels, validate=True)
    assert cross_entropy(logits, labels, validate=False).isnan()


def test_same_bits_twice() -> None:
    logits = torch.randn(777, 50304, device="cuda", dtype=BF16)
    labels = torch.randint(0, 50304, (777,), device="cuda")
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, labels, label_smoothing=0.1, z_loss=1e-4)
        loss.backward()
        results.append((loss, leaf.grad))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows come out as they do alone."""
    rows, classes = 2**31 // 131072 + 9, 131072
    logits = torch.randn(rows, classes, device="cuda", dtype=BF16)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    tail = logits[-12:].detach().clone().requires_grad_()
    logits.requires_grad_()
    losses = cross_entropy(logits, labels, reduction="none", inplace_backward=True)
    expected = cross_entropy(tail, labels[-12:], reduction="none")
    assert torch.equal(losses[-12:], expected)
    losses.sum().backward()
    expected.sum().backward()
    assert torch.equal(logits.grad[-12:], tail.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_to_one_graph(reduction: str, device: str) -> None:
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(
            logits * 2, labels, label_smoothing=0.1, reduction=reduction, inplace_backward=True
        )

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 12):
        leaf = torch.randn(rows, 1000, device=device, requires_grad=True)
        copy = leaf.detach().clone().requires_grad_()
        labels = torch.randint(0, 1000, (rows,), device=device)
        labels[1] = -100
        out, expected = compiled(leaf, labels), loss_of(copy, labels)
        torch.testing.assert_close(out, expected)
        seed = torch.randn_like(out)
        out.backward(seed)
        expected.backward(seed)
        torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduced", [False, True])
def test_operators_keep_their_word(reduced: bool, device: str) -> None:
    """Schema and fake describe what the launchers do; rows are strided."""
    logits = torch.randn(5, 120, device=device)[:, :100]
    labels = torch.randint(0, 100, (5,), device=device)
    options = (0.1, 2.0, 1e-3, -100, 0, 100)
    operators = torch.ops.flash_attn_ops
    torch.library.opcheck(operators.cross_entropy_forward.default, (logits, labels, None, *options))
    torch.library.opcheck(operators.cross_entropy_statistics.default, (logits, labels, None, *options))
    _, *parts = operators.cross_entropy_forward(logits, labels, None, *options)
    lse = parts[0] + parts[1]
    torch.library.opcheck(operators.cross_entropy_forward.default, (logits, labels, lse, *options))
    d_loss, divisor = torch.ones(5, device=device), None
    if reduced:
        d_loss, divisor = d_loss[0], torch.tensor(5, device=device)
    args = (logits, labels, *parts, d_loss, divisor, *options)
    torch.library.opcheck(operators.cross_entropy_backward.default, args)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_gradients_it_is_the_same(reduction: str, device: str) -> None:
    logits = torch.randn(2, 3, 40, device=device, requires_grad=True)
    labels = torch.tensor([[0, 39, -100], [7, 8, 9]], device=device)
    options = {"z_loss": 1e-2, "return_z_loss": True, "reduction": reduction}
    recorded = cross_entropy(logits, labels, **options)
    with torch.no_grad():
        bare = cross_entropy(logits, labels, **options)
    assert recorded[0].requires_grad and not recorded[1].requires_grad
    for with_history, without in zip(recorded, bare, strict=True):
        assert not without.requires_grad and torch.equal(with_history, without)
    assert cross_entropy(logits.detach(), labels, reduction=reduction).grad_fn is None
