"""What is measured over a validation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.task import TASKS
from flash_attn_train.metrics import Accuracy, Loss, Perplexity, Seen, bits_per_byte, build_metrics
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Output:
    """Has the fields of a task's StepOutput."""

    loss: Tensor
    num_targets: Tensor
    logits: Tensor | None
    labels: Tensor


def output_of(logits: Tensor, labels: Tensor) -> Output:
    return Output(F.cross_entropy(logits, labels), (labels != -100).sum(), logits, labels)


def test_ignored_targets_and_batches_of_other_sizes_count_as_they_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(17, 11)
    labels = torch.randint(11, (17,))
    labels[[2, 3, 5, 9, 12, 13]] = -100
    loss, perplexity = Loss(), Perplexity()
    for part in (slice(0, 3), slice(3, 4), slice(4, 17)):  # the second has no target, and its loss is NaN
        output = output_of(logits[part], labels[part])
        loss.update(output)
        perplexity.update(output)
    expected = F.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(loss.compute(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(perplexity.compute(), expected.exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [Loss, Perplexity])
def test_sums_are_exact_whatever_the_task_is_converted_to(dtype: torch.dtype, kind: type[Loss]) -> None:
    """As Lightning's bf16-true converts it: a sum of 8 bits would soon no longer grow."""
    metrics = torch.nn.ModuleDict({"metric": kind()})
    losses = torch.linspace(2.0, 3.0, 700)
    metric: Loss = metrics["metric"]  # type: ignore[assignment]
    for number, loss in enumerate(losses):
        if number in (0, 350):
            metrics.to(dtype)
        metric.update(Output(loss, torch.tensor(64), None, torch.zeros(64)))
    expected = losses.double().mean()
    torch.testing.assert_close(
        metric.compute(), expected if kind is Loss else expected.exp(), rtol=1e-9, atol=0
    )
    metric.reset()
    assert metric.loss_sum.dtype == torch.float64 and metric.loss_sum == 0


def test_perplexity_stays_finite() -> None:
    metric = Perplexity()
    metric.update(Output(torch.tensor(5000.0), torch.tensor(3), None, torch.zeros(3)))
    assert metric.compute().isfinite()


def test_bits_per_byte() -> None:
    # A uniform guess among 256 bytes is 8 bits for each of them, whatever a token holds.
    assert bits_per_byte(4 * math.log(256.0), 4.0) == pytest.approx(8.0)


def test_accuracy_of_classes_ranks_and_mixed_labels() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.8], [0.3, 0.2, 0.1], [0.0, 1.0, 2.0]])
    labels = torch.tensor([1, 2, -100, 0])
    for top_k, expected in ((1, 1 / 3), (2, 2 / 3), (5, 1.0)):
        metric = Accuracy(top_k)
        metric.update(output_of(logits, labels))
        assert metric.compute().item() == pytest.approx(expected), top_k
    mixed = Accuracy()
    mixed.update(
        Output(torch.tensor(0.0), torch.tensor(2), logits[:2], torch.tensor([[0.3, 0.7, 0], [0.6, 0.4, 0]]))
    )
    assert mixed.compute() == 1.0


def test_accuracy_of_positions() -> None:
    metric = Accuracy()
    logits = torch.zeros(2, 3, 5)
    logits[..., 4] = 1.0
    labels = torch.tensor([[4, -100, 1], [4, 4, -100]])
    metric.update(Output(torch.tensor(0.0), torch.tensor(4), logits, labels))
    assert metric.compute() == 0.75


def test_accuracy_without_logits_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"metrics\.accuracy=false"):
        Accuracy().update(Output(torch.tensor(0.0), torch.tensor(1), None, torch.zeros(1)))


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("language_model", {"loss", "perplexity"}),
        ("masked_lm", {"loss", "perplexity", "accuracy"}),
        ("sequence_classification", {"loss", "accuracy"}),
        ("image_classification", {"loss", "accuracy", "accuracy_top5"}),
    ],
)
def test_each_task_has_its_metrics(task: str, names: set[str]) -> None:
    metrics = build_metrics(MetricsConfig(), TASKS[task]())
    assert set(metrics) == names
    for _ in range(2):  # the second time without what equal metrics share
        metrics.update(output_of(torch.randn(6, 9), torch.randint(9, (6,))))
    values = metrics.compute()
    assert set(values) == names and all(value.isfinite() for value in values.values())
    nothing = MetricsConfig(perplexity=False, bits_per_byte=False, accuracy=False, top_k=[])
    assert set(build_metrics(nothing, TASKS[task]())) == {"loss"}
    metrics.reset()
    assert metrics["loss"].num_targets == 0


def test_seen_survives_another_number_of_processes() -> None:
    ids = torch.zeros(4, 8, dtype=torch.int64)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, 3:] = False
    seen = Seen()
    seen.update({"input_ids": ids})
    seen.update({"input_ids": ids, "attention_mask": mask})
    totals = seen.totals()
    assert totals == {"tokens": 32 + 27, "samples": 8}
    # Two processes continue, and each counts for itself; what they add up to is what was saved.
    first, second = Seen(), Seen()
    first.restore(totals, is_first=True)
    second.restore(totals, is_first=False)
    for process in (first, second):
        process.update({"input_ids": ids})
    assert (first.compute() + second.compute()).tolist() == [59 + 64, 8 + 8]
    images = Seen()
    images.update({"images": torch.zeros(3, 1, 2, 2)})
    assert images.totals() == {"tokens": 0, "samples": 3}
