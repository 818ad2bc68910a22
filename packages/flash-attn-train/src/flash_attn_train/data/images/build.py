"""Config -> data module, of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

from flash_attn_train.configs.data import DataConfig
from flash_attn_train.configs.image_data import DigitsDataConfig, ImageDataConfig, ImageFolderDataConfig
from flash_attn_train.configs.model import ViTModelConfig
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.task import ImageClassificationConfig
from flash_attn_train.data.build import build_data_module
from flash_attn_train.data.images import digits
from flash_attn_train.data.images.folder import ImageFolder, read_image_folder
from flash_attn_train.data.images.mixing import Mixing
from flash_attn_train.data.images.samples import ImageSamples, LabelledImages, RepeatedOrder
from flash_attn_train.data.images.transforms import EvaluationTransform, training_transform
from flash_attn_train.data.module import DataFacts, DataModule
from flash_attn_train.data.permutation import EpochOrder, SpreadOrder
from flash_attn_train.distributed import data_parallel_size
from flash_attn_train.errors import ConfigError

_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
_MAX_NAMES_IN_LINE = 8
# Options that do not change training: a run may be continued with others.
_NOT_IN_KEY = ("path", "cache_dir", "num_workers", "crop_pct")


@build_data_module.register
def _(data: DigitsDataConfig, config: TrainConfig) -> DataModule:
    model = _model_of(config)
    size = {"image_size": model.image_size, "channels": model.channels}
    train = digits.Digits("train", max_shift=data.max_shift, **size)
    validation = digits.Digits("validation", **size)
    return _module(
        train, validation, digits.NAMES, _key(train, validation, data), "scikit-learn's digits", config
    )


@build_data_module.register
def _(data: ImageFolderDataConfig, config: TrainConfig) -> DataModule:
    model = _model_of(config)
    if model.channels not in _MODES:
        raise ConfigError(
            f"model.channels: got {model.channels} with image files, expected 1 (grey) or 3 (colours)."
        )
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) not in (1, 3) or (name == "std" and min(values) <= 0):
            raise ConfigError(f"data.{name}: got {values}, expected one or three numbers, above 0 for std.")
    for name, most in (("scale", 1.0), ("ratio", math.inf)):
        values = getattr(data, name)
        if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
            raise ConfigError(
                f"data.{name}: got {values}, expected [smallest, largest], above 0 and at most {most}."
            )
    train_folder, val_folder, names = read_image_folder(data.path)
    size = {"image_size": model.image_size, "channels": model.channels}
    transforms = training_transform(data, **size), EvaluationTransform(data, **size)
    train, validation = (
        ImageFolder(
            folder,
            names,
            transform,
            mode=_MODES[model.channels],
            skip_corrupt=data.corrupt == "skip",
        )
        for folder, transform in zip((train_folder, val_folder), transforms, strict=True)
    )
    return _module(train, validation, names, _key(train, validation, data), str(train_folder.parent), config)


def _key(train: LabelledImages, validation: LabelledImages, data: ImageDataConfig) -> str:
    """Of the images, and of the options that decide what the model sees of them."""
    options = {name: value for name, value in dataclasses.asdict(data).items() if name not in _NOT_IN_KEY}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    return "-".join(part[:16] for part in (train.fingerprint(), validation.fingerprint(), digest))


def steps_of_epochs(epochs: float, num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps that so many epochs of so many samples take, rounded up."""
    return math.ceil(epochs * num_samples / global_batch_size)


def _module(
    train: LabelledImages,
    validation: LabelledImages,
    names: list[str],
    key: str,
    title: str,
    config: TrainConfig,
) -> DataModule:
    task = config.task
    assert isinstance(task, ImageClassificationConfig) and isinstance(config.data, ImageDataConfig)
    mixing = None
    if task.mixup_alpha or task.cutmix_alpha:
        mixing = Mixing(len(names), task.mixup_alpha, task.cutmix_alpha, task.mix_probability)
    repeats = config.data.num_aug_repeats
    order = RepeatedOrder(EpochOrder(len(train), seed=config.seed), repeats)
    trainer = config.trainer
    global_batch = trainer.global_batch_size or (
        trainer.batch_size * trainer.accumulate_grad_batches * data_parallel_size(config)
    )
    shown = ", ".join(names[:_MAX_NAMES_IN_LINE])
    lines = {
        "images": f"{title}: {len(train):,} to train on, {len(validation):,} held out",
        "labels": f"{len(names):,}: {shown}{', ...' if len(names) > _MAX_NAMES_IN_LINE else ''}",
        "epoch": f"{steps_of_epochs(1, len(order), global_batch):,} steps of {global_batch:,} images"
        + (f", each image {repeats} times" if repeats > 1 else ""),
    }
    return DataModule(
        ImageSamples(train, order, seed=config.seed, mixing=mixing),
        ImageSamples(validation, SpreadOrder(len(validation), max_items=trainer.val_sequences)),
        DataFacts(key=key, lines=lines, label_names=names),
        config,
    )


def _model_of(config: TrainConfig) -> ViTModelConfig:
    if not isinstance(config.task, ImageClassificationConfig) or not isinstance(config.model, ViTModelConfig):
        data: DataConfig = config.data
        raise ConfigError(
            f"data: got {type(data).__name__} for the task {type(config.task).__name__}; these data are for "
            "image_classification. Choose other data, or task=image_classification with a ViT."
        )
    return config.model
