"""Images as a function of their number."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flash_attn_train.data.batches import Batch
from flash_attn_train.data.images.mixing import Mixing
from flash_attn_train.data.permutation import Order, derive_key


class LabelledImages(Protocol):
    """Images that can be read in any order."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A hash of what images there are, hexadecimal."""
        ...

    def read(self, item: int, seed: int | None) -> tuple[Tensor, int]:
        """Image (C,H,W) float32, normalised, and its class. What is random in it follows from ``seed``; None is the
        image as it is validated. The class is -100 where the image cannot be read and is not to count."""
        ...


class RepeatedOrder:
    """An order in which each item comes ``repeats`` times in a row.

    Repeated augmentation (Hoffer et al. 2019, arXiv:1901.09335): the repeats, which are augmented differently, are in
    one optimizer step if its batch is large. An epoch has ``repeats`` times as many samples; every item is in it.
    """

    def __init__(self, order: Order, repeats: int) -> None:
        self.order, self.repeats = order, repeats

    def __len__(self) -> int:
        return len(self.order) * self.repeats

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers >= 0 -> items, (n,) int64."""
        return self.order(numbers // self.repeats)


class ImageSamples:
    """``images`` (n,C,H,W) float32, and ``labels``: classes (n,) int64, or of mixed images probabilities (n,classes).

    A pure function of the numbers and the seed: that of a sample's augmentation follows from its number, that of
    mixing from the number of a batch's first sample.

    Args:
        images: to take samples of.
        order: sample number -> image.
        seed: of augmentation and mixing; None for validation, which has neither.
        mixing: of training batches, if any.
    """

    def __init__(
        self, images: LabelledImages, order: Order, *, seed: int | None = None, mixing: Mixing | None = None
    ) -> None:
        self.images, self.order, self.seed, self.mixing = images, order, seed, mixing

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, numbers: np.ndarray) -> Batch:
        seeds = [None if self.seed is None else derive_key(self.seed, number, 2) for number in numbers]
        pairs = [
            self.images.read(item, seed)
            for item, seed in zip(self.order(numbers).tolist(), seeds, strict=True)
        ]
        images = torch.stack([image for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        if self.mixing is not None and self.seed is not None:
            random = np.random.default_rng([self.seed, int(numbers[0]), 3])
            images, labels = self.mixing(images, labels, random)
        return {"images": images, "labels": labels}
