"""Scikit-learn's handwritten digits."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn_train.data.extras import require

_LARGEST_VALUE = 16.0
_HELD_OUT = 5  # every fifth of a class
NAMES = [str(digit) for digit in range(10)]


class Digits:
    """A split of the 1,797 images of 8 x 8 pixels, in memory, resized to the model's size.

    (E. Alpaydin and C. Kaynak, 1998: Optical Recognition of Handwritten Digits, UCI; the part that scikit-learn has.)

    Args:
        split: "train" or "validation".
        image_size, channels: of what ``read`` returns; the one channel there is is repeated.
        max_shift: largest random shift, in pixels of the 8 x 8.

    Raises:
        DataError: scikit-learn is not installed.
    """

    def __init__(self, split: str, *, image_size: int, channels: int, max_shift: int = 0) -> None:
        datasets = require("sklearn.datasets", "images", "has the digits")
        images, labels = datasets.load_digits(return_X_y=True)
        chosen = _is_held_out(labels) == (split == "validation")
        self.labels = labels[chosen].astype(np.int64)
        pixels = torch.tensor(images.reshape(-1, 1, 8, 8), dtype=torch.float32) / _LARGEST_VALUE
        std, mean = torch.std_mean(pixels[~_is_held_out(labels)])
        self.background = float(-mean / std)  # black, normalised
        self.images = ((pixels - mean) / std)[chosen]
        self.image_size, self.channels, self.max_shift = image_size, channels, max_shift

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 of images and labels."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.tobytes()).hexdigest()

    def read(self, item: int, seed: int | None) -> tuple[Tensor, int]:
        image = self.images[item]
        if seed is not None and self.max_shift:
            most = self.max_shift
            down, right = np.random.default_rng(seed).integers(0, 2 * most + 1, 2)
            image = F.pad(image, (most,) * 4, value=self.background)[:, down : down + 8, right : right + 8]
        if self.image_size != 8:
            size = (self.image_size, self.image_size)
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        return image.expand(self.channels, -1, -1), int(self.labels[item])


def _is_held_out(labels: np.ndarray) -> np.ndarray:
    """(n,) bool: every fifth image of each class."""
    held_out = np.zeros(len(labels), bool)
    for digit in np.unique(labels):
        held_out[np.flatnonzero(labels == digit)[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return held_out
