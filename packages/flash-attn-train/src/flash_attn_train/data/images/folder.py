"""Images in one folder for each class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_attn_train.data.extras import require
from flash_attn_train.errors import ConfigError, DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_MAX_NAMES_IN_MESSAGE = 5
# Takes a PIL image and the seed of what is random; see flash_attn_train.data.images.transforms.
Transform = Callable[..., Tensor]


class ImageFolder:
    """The images of a split, whose classes are the names of folders.

    What is kept in memory is a file name (without folders) and a class for each.

    Args:
        folder: with a folder for each class.
        class_names: names of the folders, in the order of the classes' numbers.
        transform: PIL image and seed -> tensor.
        mode: of PIL: "RGB", or "L" for one channel.
        skip_corrupt: an image that cannot be read is an error; with True it is replaced by the next one in training,
            and by a grey one that does not count in validation.

    Raises:
        DataError: Pillow is not installed, the folder cannot be read, or a class has no images.
    """

    def __init__(
        self,
        folder: Path,
        class_names: list[str],
        transform: Transform,
        *,
        mode: str = "RGB",
        skip_corrupt: bool = False,
    ) -> None:
        self.folder, self.class_names, self.transform = folder, class_names, transform
        self.mode, self.skip_corrupt = mode, skip_corrupt
        self.num_skipped = 0  # by this process
        self._open = require("PIL.Image", "images", "reads images").open
        per_class = [_image_files(folder / name) for name in class_names]
        empty = [name for name, files in zip(class_names, per_class, strict=True) if not files]
        if empty:
            raise DataError(
                f"data.path: {folder / empty[0]} has no images; expected files that end in {', '.join(SUFFIXES)}. "
                f"{len(empty)} of {len(class_names)} classes have none."
            )
        # Arrays, not lists: worker processes share them, while counting references would copy the pages of objects.
        self.files = np.array([os.fsencode(file) for files in per_class for file in files])
        self.labels = np.repeat(
            np.arange(len(class_names), dtype=np.int64), [len(files) for files in per_class]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 of the names of classes and files, not of their content: reading that would take hours."""
        names = "\0".join(self.class_names)
        digest = hashlib.sha256(names.encode("utf-8", "surrogatepass"))  # they need not be UTF-8
        digest.update(self.files.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def file(self, item: int) -> Path:
        label = int(self.labels[item])
        return self.folder / self.class_names[label] / os.fsdecode(bytes(self.files[item]))

    def read(self, item: int, seed: int | None) -> tuple[Tensor, int]:
        for other in range(item, item + len(self)):
            number = other % len(self)
            try:
                return self._read(number, seed), int(self.labels[number])
            except DataError as error:
                if not self.skip_corrupt:
                    raise
                self.num_skipped += 1
                warnings.warn(f"skipped image {self.num_skipped} of this process: {error}", stacklevel=2)
                if seed is None:
                    return torch.zeros_like(self.transform(self._black(), None)), -100
        raise DataError(f"data.path: no image of {self.folder} can be read.")

    def _read(self, item: int, seed: int | None) -> Tensor:
        file = self.file(item)
        try:
            with self._open(file) as image:
                pixels = image.convert(self.mode)
        except Exception as error:  # Pillow's decoders raise many types for damaged files
            raise DataError(
                f"image {file} cannot be read: {error}. Replace or remove it, or leave such images out with "
                "data.corrupt=skip."
            ) from error
        return self.transform(pixels, seed)

    def _black(self) -> object:
        return require("PIL.Image", "images", "reads images").new(self.mode, (8, 8))


def read_image_folder(path: str) -> tuple[Path, Path, list[str]]:
    """Folders of the two splits, and the names of the classes, sorted.

    Raises:
        ConfigError: no path.
        DataError: a folder is missing, or the splits do not have the same classes.
    """
    if not path:
        raise ConfigError("data.path: got '', expected a folder with train/ and val/ in it. Set data.path.")
    root = Path(path).expanduser()
    train, validation = root / "train", root / "val"
    names = [_class_names(folder) for folder in (train, validation)]
    differing = sorted(set(names[0]) ^ set(names[1]))
    if differing:
        only_in = train if differing[0] in names[0] else validation
        shown = ", ".join(differing[:_MAX_NAMES_IN_MESSAGE])
        raise DataError(
            f"data.path: {train} and {validation} do not have the same classes: {len(differing)} are in one alone "
            f"({shown}{', ...' if len(differing) > _MAX_NAMES_IN_MESSAGE else ''}; {differing[0]} in {only_in}). "
            "Expected a folder for each class in both."
        )
    return train, validation, names[0]


def _class_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(
            f"data.path: cannot read {folder} ({error.strerror}); expected a folder with one folder of images for "
            "each class."
        ) from error
    if not names:
        raise DataError(f"data.path: {folder} has no folders; expected one of images for each class.")
    return names


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )
