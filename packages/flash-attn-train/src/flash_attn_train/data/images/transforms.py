"""From decoded images to tensors, in training and validation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flash_attn_train.configs.image_data import ImageFolderDataConfig
from flash_attn_train.data.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

# Attempts at a crop of the drawn area and shape before the largest one in the middle is taken.
_CROP_ATTEMPTS = 10


class EvaluationTransform:
    """Resizes the shorter side, crops the middle, and normalises, as timm's evaluation transform does.

    Args:
        config: its crop_pct, interpolation, mean and std.
        image_size: height and width of the result, in pixels.
        channels: of the result.
    """

    def __init__(self, config: ImageFolderDataConfig, *, image_size: int, channels: int) -> None:
        self.image_size = image_size
        self.resized = int(image_size / config.crop_pct)
        self.filter = _filter("bicubic" if config.interpolation == "random" else config.interpolation)
        self.normalise = Normalise(config, channels)

    def __call__(self, image: Image, seed: int | None) -> Tensor:
        width, height = image.size
        if width <= height:
            size = (self.resized, int(self.resized * height / width))
        else:
            size = (int(self.resized * width / height), self.resized)
        image = image.resize(size, self.filter)
        left, top = (round((side - self.image_size) / 2) for side in size)
        return self.normalise(image.crop((left, top, left + self.image_size, top + self.image_size)))


class CropAndFlip:
    """A crop of random area, shape and place (Szegedy et al. 2014, arXiv:1409.4842), resized and maybe mirrored."""

    def __init__(self, config: ImageFolderDataConfig, *, image_size: int, channels: int) -> None:
        self.config, self.image_size = config, image_size
        self.normalise = Normalise(config, channels)

    def __call__(self, image: Image, seed: int | None) -> Tensor:
        drawn = np.random.default_rng(seed)
        name = self.config.interpolation
        if name == "random":
            name = ("bilinear", "bicubic")[drawn.integers(2)]
        size = (self.image_size, self.image_size)
        image = image.resize(size, _filter(name), box=self._box(image.size, drawn))
        if drawn.random() < self.config.hflip:
            image = image.transpose(require("PIL.Image", "images", "reads images").Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(image)

    def _box(self, size: tuple[int, int], drawn: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the crop."""
        width, height = size
        (smallest, largest), (lowest, highest) = self.config.scale, self.config.ratio
        for _ in range(_CROP_ATTEMPTS):
            area = width * height * drawn.uniform(smallest, largest)
            shape = np.exp(drawn.uniform(np.log(lowest), np.log(highest)))
            across, down = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
            if 0 < across <= width and 0 < down <= height:
                left, top = int(drawn.integers(width - across + 1)), int(drawn.integers(height - down + 1))
                return left, top, left + across, top + down
        across, down = min(width, round(height * highest)), min(height, round(width / lowest))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down


class TimmTransform:
    """timm's training transform. It draws from three global generators, which are seeded for each image and put back
    afterwards.

    Raises:
        DataError: timm is not installed.
    """

    def __init__(self, config: ImageFolderDataConfig, *, image_size: int, channels: int) -> None:
        timm = require("timm.data", "images", "augments images")
        self._transform: Any = timm.create_transform(
            (channels, image_size, image_size),
            is_training=True,
            scale=tuple(config.scale),
            ratio=tuple(config.ratio),
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=_per_channel(config.mean, channels),
            std=_per_channel(config.std, channels),
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
        for operation in _operations(self._transform):
            if operation.aug_fn.__name__ == "posterize":
                operation.aug_fn = _posterize

    def __call__(self, image: Image, seed: int | None) -> Tensor:
        with seeded_globally(seed or 0):
            return self._transform(image)


class Normalise:
    """PIL image -> (value / 255 - mean) / std, (C,H,W) float32."""

    def __init__(self, config: ImageFolderDataConfig, channels: int) -> None:
        self.mean, self.std = (
            torch.tensor(_per_channel(values, channels))[:, None, None]
            for values in (config.mean, config.std)
        )

    def __call__(self, image: Image) -> Tensor:
        pixels = np.array(image, np.uint8)  # a copy: torch wants it writable
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return (torch.from_numpy(pixels).float().div_(255.0) - self.mean) / self.std


def training_transform(
    config: ImageFolderDataConfig, *, image_size: int, channels: int
) -> CropAndFlip | TimmTransform:
    """timm's where there is more to do than to crop and mirror.

    Raises:
        DataError: timm is needed and not installed.
    """
    needs_timm = config.auto_augment is not None or config.color_jitter or config.random_erasing
    return (TimmTransform if needs_timm else CropAndFlip)(config, image_size=image_size, channels=channels)


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's (CPU) global generators, and puts their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _operations(transform: Any) -> list[Any]:
    """The single operations of timm's policies in a composed transform."""
    found: list[Any] = []
    for part in transform.transforms:
        found += getattr(part, "ops", [])
        found += [operation for steps in getattr(part, "policy", []) for operation in steps]
    return found


def _posterize(image: Image, bits_to_keep: int, **options: Any) -> Image:
    """timm's operation, which asks Pillow for 0 bits at its strongest; Pillow 13 refuses that."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return require("PIL.ImageOps", "images", "reads images").posterize(image, bits_to_keep)


def _filter(name: str) -> Any:
    return require("PIL.Image", "images", "reads images").Resampling[name.upper()]


def _per_channel(values: list[float], channels: int) -> tuple[float, ...]:
    """One number for each channel; of too many, as of colours for one of grey, the mean."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
