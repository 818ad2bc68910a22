"""Mixup and cutmix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flash_attn_train.data.images import Mixing

IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 1, 12, 10).contiguous()  # image i is i everywhere
LABELS = torch.arange(4)


def mix(seed: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    return Mixing(4, **options)(IMAGES, LABELS, np.random.default_rng(seed))


def test_mixup_mixes_labels_as_it_mixes_pixels() -> None:
    for seed in range(10):
        images, labels = mix(seed, mixup_alpha=0.8)
        assert images.dtype == labels.dtype == torch.float32
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        # The expected label of a pixel that is its image's number is that number.
        torch.testing.assert_close(images.mean((1, 2, 3)), labels @ torch.arange(4.0))
        assert (images[0] == images[0, 0, 0, 0]).all()


def test_cutmix_takes_a_rectangle_and_its_share_of_the_label() -> None:
    cut = 0
    for seed in range(20):
        images, labels = mix(seed, cutmix_alpha=1.0)
        assert set(images[0].unique().tolist()) <= {0.0, 3.0}
        torch.testing.assert_close(images.mean((1, 2, 3)), labels @ torch.arange(4.0))
        others = (images[0, 0] == 3.0).nonzero()
        if len(others):
            cut += 1
            height, width = (others.max(0).values - others.min(0).values + 1).tolist()
            assert height * width == len(others)
    assert cut > 10


def test_with_both_each_is_used_and_batches_may_stay_as_they_are() -> None:
    is_cut = [len(mix(seed, mixup_alpha=0.8, cutmix_alpha=1.0)[0][0].unique()) == 2 for seed in range(30)]
    assert 5 < sum(is_cut) < 25
    mixed = [not torch.equal(mix(seed, mixup_alpha=0.8, probability=0.5)[0], IMAGES) for seed in range(60)]
    assert 15 < sum(mixed) < 45
    images, labels = mix(0, mixup_alpha=0.8, probability=0.0)
    assert torch.equal(images, IMAGES) and torch.equal(labels, torch.eye(4))


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.3}, {"cutmix_alpha": 1.0}])
def test_share_has_the_mean_of_its_distribution(options: dict) -> None:
    shares = [float(mix(seed, **options)[1][0, 0]) for seed in range(300)]
    # A rectangle loses what is outside of the image, so its share of the own image is larger.
    low, high = (0.44, 0.56) if "mixup_alpha" in options else (0.5, 0.75)
    assert low < sum(shares) / len(shares) < high
