"""Options of the data group's entries of images."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.data import DataConfig
from flash_attn_train.configs.option import option


@dataclass
class ImageDataConfig(DataConfig):
    """What all images have. Their size and channels are the model's."""

    num_aug_repeats: int = option(
        1, "times that each image is taken in a row, augmented anew (repeated augmentation)", at_least=1
    )


@dataclass
class DigitsDataConfig(ImageDataConfig):
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, a fifth of each class held out. Needs no network, but
    flash-attn-train[images]."""

    max_shift: int = option(
        0,
        "in training move each image by up to so many of its own pixels, in both directions",
        at_least=0,
        at_most=4,
    )


@dataclass
class ImageFolderDataConfig(ImageDataConfig):
    """Folders train/ and val/ with one folder of JPEG, PNG, ... files for each class, as ImageNet is usually kept."""

    path: str = option("", "folder with train/ and val/")
    corrupt: str = option(
        "error",
        "at an image that cannot be read: stop; or skip it, taking the next one in training",
        choices=("error", "skip"),
    )
    mean: list[float] = option(
        [0.485, 0.456, 0.406], "subtracted from each channel, of values in [0, 1]; one number for all will do"
    )
    std: list[float] = option(
        [0.229, 0.224, 0.225], "each channel is divided by it; one number for all will do"
    )
    crop_pct: float = option(
        0.9,
        "in validation the shorter side is resized to model.image_size / crop_pct, and the middle taken",
        above=0.0,
        at_most=1.0,
    )
    interpolation: str = option(
        "bicubic",
        "resampling; random: in training bilinear or bicubic by chance, in validation bicubic",
        choices=("bicubic", "bilinear", "random"),
    )
    scale: list[float] = option(
        [0.08, 1.0], "smallest and largest share of an image's area that a training crop has"
    )
    ratio: list[float] = option(
        [0.75, 1.3333333333333333], "smallest and largest width / height of a training crop"
    )
    hflip: float = option(0.5, "probability of mirroring a training image", at_least=0.0, at_most=1.0)
    auto_augment: str | None = option(
        None,
        "timm's policy, such as rand-m9-mstd0.5-inc1 (RandAugment); null: none. Needs flash-attn-train[images]",
    )
    color_jitter: float = option(
        0.0,
        "strength of random brightness, contrast and saturation. Needs flash-attn-train[images]",
        at_least=0.0,
    )
    random_erasing: float = option(
        0.0,
        "probability of filling a random rectangle with noise. Needs flash-attn-train[images]",
        at_least=0.0,
        at_most=1.0,
    )


# Of config group `data`: name on the command line -> schema.
IMAGE_DATA: dict[str, type[ImageDataConfig]] = {
    "digits": DigitsDataConfig,
    "image_folder": ImageFolderDataConfig,
}
