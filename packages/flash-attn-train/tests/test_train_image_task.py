"""Loss and metrics of images."""

from __future__ import annotations

import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.models import DataSizes
from flash_attn_train.tasks import ImageClassification, build_task
from torch.nn import functional as F

SMALL = ("model.image_size=8", "model.patch_size=4", "model.n_layer=1", "model.n_head=2", "model.d_model=16")


@pytest.fixture
def task() -> ImageClassification:
    groups = ("experiment=none", "task=image_classification", "model=vit", "data=digits")
    config = compose_config([*groups, *SMALL, "task.label_smoothing=0.1", "metrics.top_k=[2]"])
    built = build_task(config, DataSizes(num_classes=5))
    assert isinstance(built, ImageClassification)
    built.configure_model()
    return built


def test_positions_are_patches_and_the_class_token(task: ImageClassification) -> None:
    assert task.tokens_per_sample == 5


def test_labels_are_smoothed_in_training_alone(task: ImageClassification) -> None:
    batch = {"images": torch.randn(6, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3, 4, -100])}
    with torch.no_grad():
        trained, measured = task.train().step(batch), task.eval().step(batch)
    logits = task.model(batch["images"]).logits
    torch.testing.assert_close(measured.loss, F.cross_entropy(logits[:5], batch["labels"][:5]))
    expected = F.cross_entropy(logits[:5], 0.9 * torch.eye(5) + 0.02)
    torch.testing.assert_close(trained.loss, expected)
    assert int(trained.num_targets) == 5


def test_probabilities_as_labels(task: ImageClassification) -> None:
    labels = torch.rand(6, 5).softmax(1)
    batch = {"images": torch.randn(6, 3, 8, 8), "labels": labels}
    with torch.no_grad():
        output = task.eval().step(batch)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, -(labels * output.logits.log_softmax(1)).sum(1).mean())
    assert int(output.num_targets) == 6 and output.num_targets.dtype == torch.int64


def test_accuracy_is_measured(task: ImageClassification) -> None:
    with torch.no_grad():
        output = task.eval().step({"images": torch.randn(6, 3, 8, 8), "labels": torch.arange(6) % 5})
    task.val_metrics.update(output)
    assert output.logits is not None
    two = output.logits.topk(2).indices
    values = task.val_metrics.compute()
    assert float(values["accuracy"]) == pytest.approx(float((two[:, 0] == output.labels).double().mean()))
    assert float(values["accuracy_top2"]) == pytest.approx(
        float((two == output.labels[:, None]).any(1).double().mean())
    )
