"""Mixup and cutmix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with another, and their labels alike.

    One share and one rectangle for the whole batch, and image i is mixed with the i-th from the end, as timm does it.
    With both methods on, a batch is mixed with either, with equal probability.

    Attributes:
        n_classes: of the labels.
        mixup_alpha: a pixel is share * own + (1 - share) * other, the share from Beta(alpha, alpha) (Zhang et al. 2017,
            arXiv:1710.09412). 0: off.
        cutmix_alpha: a rectangle with about 1 - share of the area comes from the other (Yun et al. 2019,
            arXiv:1905.04899). 0: off.
        probability: of mixing a batch at all.
    """

    n_classes: int
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0

    def __call__(self, images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Images (B,C,H,W) and classes (B,) int64 -> images, and probabilities (B,n_classes) float32."""
        targets = F.one_hot(labels, self.n_classes).float()
        if random.random() >= self.probability:
            return images, targets
        is_cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or random.random() < 0.5)
        alpha = self.cutmix_alpha if is_cutmix else self.mixup_alpha
        share = float(random.beta(alpha, alpha))
        if is_cutmix:
            images, share = _cut(images, share, random)
        else:
            images = torch.lerp(images.flip(0), images, share)
        return images, torch.lerp(targets.flip(0), targets, share)


def _cut(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Images with a rectangle of others', and the share of pixels that are still their own."""
    height, width = images.shape[-2:]
    side = np.sqrt(1.0 - share)
    rows, columns = (_span(size, side, random) for size in (height, width))
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    cut = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1.0 - cut / (height * width)  # what is outside of the image is not cut


def _span(size: int, side: float, random: np.random.Generator) -> slice:
    """A part of ``side`` of an axis around a random middle, as far as it is inside."""
    middle, length = int(random.integers(size)), int(size * side)
    return slice(max(0, middle - length // 2), min(size, middle - length // 2 + length))
