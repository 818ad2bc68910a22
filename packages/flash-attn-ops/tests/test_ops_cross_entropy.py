"""Cross-entropy away from the GPU: the reference, the options, the in-place gradient, rejected arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.cross_entropy import CrossEntropyLoss, cross_entropy
from flash_attn_ops.distributed import Group
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LABELS = torch.tensor([3, -100, 0, 6, 2])


def textbook(
    logits: Tensor, labels: Tensor, *, label_smoothing=0.0, logit_scale=1.0, z_loss=0.0, ignore_index=-100
):
    """The losses, row by row, as the equation has them."""
    losses = []
    for row, label in zip(logits * logit_scale, labels.tolist(), strict=True):
        if label == ignore_index:
            losses.append(row.new_zeros(()))
            continue
        lse = row.exp().sum().log()
        losses.append(
            lse - (1 - label_smoothing) * row[label] - label_smoothing * row.mean() + z_loss * lse**2
        )
    return torch.stack(losses)


OPTIONS = [
    {},
    {"label_smoothing": 0.3},
    {"logit_scale": 0.4},
    {"z_loss": 0.2},
    {"ignore_index": 6},
    {"label_smoothing": 1.0, "logit_scale": -1.5, "z_loss": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_against_the_equation(options: dict, inplace_backward: bool) -> None:
    labels = LABELS if options.get("ignore_index") is None else LABELS.clamp(min=0)
    leaf = torch.randn(5, 7, dtype=FP64, requires_grad=True)
    exact = leaf.detach().clone().requires_grad_()
    hidden = leaf * 1
    losses = cross_entropy(hidden, labels, reduction="none", inplace_backward=inplace_backward, **options)
    expected = textbook(exact, labels, **options)
    torch.testing.assert_close(losses, expected)
    upstream = torch.randn(5, dtype=FP64)
    losses.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(leaf.grad, exact.grad)
    assert torch.equal(hidden, leaf.grad) == inplace_backward


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_against_torch(dtype: torch.dtype, reduction: str) -> None:
    logits, labels = (torch.randn(5, 7) * 3).to(dtype), LABELS
    results = []
    for precision, loss_function in (
        (dtype, cross_entropy),
        (FP64, F.cross_entropy),
        (dtype, F.cross_entropy),
    ):
        leaf = logits.to(precision).clone().requires_grad_()
        loss = loss_function(leaf, labels, reduction=reduction, label_smoothing=0.1)
        loss.backward(torch.full_like(loss, 1.5))
        results.append((loss, leaf.grad))
    for factor, (actual, exact, same) in zip((2.0, 3.0), zip(*results, strict=True), strict=True):
        assert_within_reference_error(actual, exact, same, factor=factor)
    assert results[0][0].dtype == FP32 and results[0][1].dtype == dtype


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(options: dict, reduction: str) -> None:
    labels = LABELS if options.get("ignore_index") is None else LABELS.clamp(min=0)
    logits = torch.randn(5, 7, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, labels, reduction=reduction, **options), (logits,)
    )


def test_every_option_acts() -> None:
    logits = torch.randn(5, 7)
    plain = cross_entropy(logits, LABELS)
    for options in (*OPTIONS[1:5], {"reduction": "sum"}):
        changed = cross_entropy(
            logits, LABELS.clamp(min=0) if "ignore_index" in options else LABELS, **options
        )
        assert not torch.equal(changed, plain), options
    assert cross_entropy(logits, LABELS, reduction="none").shape == (5,)


def test_leading_dimensions() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.stack([LABELS, LABELS.flip(0)])
    flat = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert torch.equal(cross_entropy(logits, labels, reduction="none"), flat.view(2, 5))
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert cross_entropy(logits[0, 0], labels[0, 0]).shape == ()


def test_no_row_to_average() -> None:
    ignored = torch.full((5,), -100)
    for labels, rows in ((ignored, 5), (ignored[:0], 0)):
        logits = torch.randn(rows, 7, requires_grad=True)
        assert cross_entropy(logits, labels).isnan() and F.cross_entropy(logits, labels).isnan()
        assert cross_entropy(logits, labels, reduction="sum") == 0
        assert cross_entropy(logits, labels, reduction="none").shape == (rows,)
        cross_entropy(logits, labels).backward()
        assert torch.equal(logits.grad, torch.zeros(rows, 7))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_ignored_rows_may_hold_anything(inplace_backward: bool) -> None:
    logits = torch.randn(5, 7)
    logits[1] = float("nan")
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, LABELS, z_loss=0.1, inplace_backward=inplace_backward)
    loss.backward()
    assert loss.isfinite() and torch.equal(leaf.grad[1], torch.zeros(7)) and leaf.grad.isfinite().all()


def test_second_backward() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    loss = cross_entropy(logits, LABELS)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * once)
    loss = cross_entropy(logits, LABELS, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


def test_other_users_of_the_overwritten_logits_find_out() -> None:
    logits = torch.randn(5, 7, requires_grad=True) * 1
    square = logits.square().sum()
    cross_entropy(logits, LABELS, inplace_backward=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_double_backward_is_an_error() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, LABELS).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.sum().backward()


def test_large_logits() -> None:
    """Sums of exponentials that would overflow."""
    logits = torch.tensor([[1e4, 0.0, 1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.6931471805599453)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_to_one_graph(inplace_backward: bool) -> None:
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=0.1, inplace_backward=inplace_backward)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        leaf = torch.randn(rows, 7, requires_grad=True)
        copy = leaf.detach().clone().requires_grad_()
        hidden = leaf * 1
        before = hidden.detach().clone()
        compiled(hidden, LABELS[:rows]).backward()
        loss_of(copy * 1, LABELS[:rows]).backward()
        torch.testing.assert_close(leaf.grad, copy.grad)
        assert torch.equal(hidden, before), "a compiled graph does not see its inputs overwritten"


def test_autocast_changes_nothing() -> None:
    logits = torch.randn(5, 7).to(BF16)
    expected = cross_entropy(logits, LABELS)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(cross_entropy(logits, LABELS), expected)


def test_module_is_the_function() -> None:
    logits = torch.randn(5, 7)
    options = {
        "label_smoothing": 0.1,
        "logit_scale": 0.5,
        "z_loss": 0.01,
        "ignore_index": 6,
        "reduction": "sum",
        "inplace_backward": True,
        "vocab_size": 7,
    }
    labels = LABELS.clamp(min=0)
    assert torch.equal(CrossEntropyLoss(**options)(logits, labels), cross_entropy(logits, labels, **options))
    leaf = torch.randn(5, 7, requires_grad=True)
    CrossEntropyLoss(**options)(leaf, labels).backward()
    assert torch.equal(leaf.grad, leaf), "the in-place gradient"
    returned = CrossEntropyLoss(return_z_loss=True, **options)(logits, labels, logits.logsumexp(-1))
    assert len(returned) == 2 and returned[1] > 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_returned_z_loss(reduction: str) -> None:
    logits = torch.randn(5, 7, dtype=FP64, requires_grad=True)
    options = {"z_loss": 0.2, "reduction": reduction, "logit_scale": 0.5}
    loss, z_part = cross_entropy(logits, LABELS, return_z_loss=True, **options)
    parts = (0.2 * (0.5 * logits).logsumexp(-1).square()).masked_fill(LABELS == -100, 0.0)
    expected = {"none": parts, "sum": parts.sum(), "mean": parts.sum() / 4}[reduction]
    torch.testing.assert_close(z_part, expected.detach())
    torch.testing.assert_close(loss, cross_entropy(logits, LABELS, **options))
    torch.testing.assert_close(
        loss - z_part, cross_entropy(logits, LABELS, reduction=reduction, logit_scale=0.5)
    )
    assert loss.requires_grad and not z_part.requires_grad
    assert not cross_entropy(logits, LABELS, return_z_loss=True)[1].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_precomputed_lse(options: dict) -> None:
    """The same loss and gradient; a wrong one is believed."""
    labels = LABELS if options.get("ignore_index") is None else LABELS.clamp(min=0)
    logits = torch.randn(5, 7, dtype=FP64)
    lse = (logits * options.get("logit_scale", 1.0)).logsumexp(-1)
    results = []
    for given in (None, lse):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, labels, precomputed_lse=given, **options)
        loss.backward()
        results.append((loss, leaf.grad))
    for without, given in zip(*results, strict=True):
        torch.testing.assert_close(given, without)
    assert not torch.isclose(cross_entropy(logits, labels, precomputed_lse=lse + 1, **options), results[0][0])


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_padded_vocabulary(inplace_backward: bool) -> None:
    """Columns behind vocab_size take no part, whatever they hold."""
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "inplace_backward": inplace_backward}
    padded = torch.randn(5, 9)
    padded[:, 7:] = torch.nan
    leaf, exact = padded.clone().requires_grad_(), padded[:, :7].clone().requires_grad_()
    loss, expected = (
        cross_entropy(leaf * 1, LABELS, vocab_size=7, **options),
        cross_entropy(exact * 1, LABELS, **options),
    )
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(leaf.grad[:, :7], exact.grad)
    assert torch.equal(leaf.grad[:, 7:], torch.zeros(5, 2))


def test_labels_are_validated_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn_ops.cross_entropy.labels import check_labels

    class OnGPU(Tensor):
        """Its labels are not read unless asked."""

        device = torch.device("cuda")

    labels = torch.tensor([3, 7, -100, -1]).as_subclass(OnGPU)
    check_labels(labels, 7, -100, None)
    check_labels(labels, 7, -100, False)
    with pytest.raises(ValueError, match="labels: got 7 in row 1, the first of 2 out of range"):
        check_labels(labels, 7, -100, True)
    monkeypatch.setenv("FLASH_ATTN_OPS_VALIDATE_LABELS", "1")
    with pytest.raises(ValueError, match="labels: got -1 in row 3"):
        check_labels(labels, 8, -100, None)
    logits = torch.randn(2, 7)
    assert cross_entropy(logits, torch.tensor([7, 1]), validate=False).isnan()


def test_a_group_of_one_process_is_none() -> None:
    logits = torch.randn(5, 7)
    assert torch.equal(cross_entropy(logits, LABELS, process_group=Group()), cross_entropy(logits, LABELS))


LOGITS = torch.ones(5, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": LOGITS.long()}, r"logits: got torch.int64; expected a floating-point dtype"),
        ({"logits": torch.ones(5, 0)}, r"logits: got shape \(5, 0\); expected \(\.\.\., V\) with V >= 1"),
        ({"logits": torch.tensor(1.0)}, r"logits: got shape \(\)"),
        (
            {"labels": LABELS.int()},
            r"labels: got torch.int32; expected torch.int64.*labels.to\(torch.int64\)",
        ),
        ({"labels": LABELS[:4]}, r"labels: got shape \(4,\); expected \(5,\)"),
        ({"labels": LABELS.to("meta")}, r"labels: got a tensor on meta; expected cpu, where logits is"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 7])},
            r"labels: got 7 in row 4, the first of 1.*; expected classes in \[0, 7\)",
        ),
        ({"labels": torch.tensor([0, 1, -1, 3, 4])}, r"labels: got -1"),
        ({"labels": LABELS, "ignore_index": 0}, r"labels: got -100 in row 1.*ignore_index \(0\)"),
        ({"reduction": "avg"}, r"reduction: got 'avg'; expected 'none', 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: got 1.5; expected a number in \[0, 1\]"),
        ({"logit_scale": float("inf")}, r"logit_scale: got inf; expected a finite number"),
        ({"logit_scale": torch.tensor(2.0)}, r"logit_scale: got Tensor; expected a number"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, r"logit_scale: got Tensor; .*no gradient"),
        ({"label_smoothing": None}, r"label_smoothing: got NoneType; expected a number"),
        ({"z_loss": "0.1"}, r"z_loss: got str; expected a number"),
        ({"logits": None}, r"logits: got None; expected a torch.Tensor"),
        ({"process_group": "tp"}, r"process_group: got str; expected a ProcessGroup"),
        ({"process_group": Group("", 2, 0)}, r"process_group: got Group.*; expected a ProcessGroup"),
        ({"z_loss": -0.1}, r"z_loss: got -0.1; expected a finite number >= 0"),
        ({"precomputed_lse": torch.ones(4)}, r"precomputed_lse: got shape \(4,\); expected \(5,\)"),
        ({"precomputed_lse": torch.ones(5).long()}, r"precomputed_lse: got torch.int64"),
        ({"vocab_size": 8}, r"vocab_size: got 8; expected at most 7, the classes of logits"),
        ({"vocab_size": 0}, r"vocab_size: got 0; expected a positive number"),
        ({"vocab_size": 6}, r"labels: got 6 in row 3"),
        ({"vocab_start": 0}, r"vocab_start: got 0; expected None without process_group"),
        (
            {"logits": torch.ones(7, 5).t(), "inplace_backward": True},
            r"inplace_backward: got logits of strides",
        ),
        (
            {"logits": LOGITS[:1].expand(5, 7), "inplace_backward": True},
            r"inplace_backward: got logits of strides",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejected_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        cross_entropy(**{"logits": LOGITS, "labels": LABELS, **change})
    assert "Fix: " in str(error.value)
