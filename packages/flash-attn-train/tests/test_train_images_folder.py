"""Folders of images: what is read, in which order, and what is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.image_data import ImageFolderDataConfig
from flash_attn_train.data import DataModule, build_data
from flash_attn_train.data.batches import TrainBatches
from flash_attn_train.data.images import steps_of_epochs
from flash_attn_train.data.images.transforms import CropAndFlip, EvaluationTransform, training_transform
from flash_attn_train.data.share import Share
from flash_attn_train.errors import CheckpointError, ConfigError, DataError
from torch.utils.data import DataLoader

Image = pytest.importorskip("PIL.Image", reason="reads images: pip install flash-attn-train[images]")
CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images to train on and two to validate on of each of three classes, of different sizes."""
    drawn = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = drawn.integers(0, 256, (20 + number, 30 - number, 3), np.uint8)
                suffix = ("png", "JPEG")[number % 2]
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.{suffix}")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    return tmp_path


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    own = [
        *("task=image_classification", "model=vit", "model.image_size=16", "model.patch_size=8"),
        *("data=image_folder", f"data.path={folder}", "trainer.batch_size=4", "trainer.val_sequences=null"),
    ]
    return compose_config(["experiment=none", *own, *overrides])


def data_of(folder: Path, *overrides: str) -> DataModule:
    return build_data(config_of(folder, *overrides))


def equal(batch: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(batch[name], other[name]) for name in batch | other)


def test_classes_are_the_sorted_names_of_folders(folder: Path) -> None:
    data = data_of(folder)
    assert data.label_names == list(CLASSES) and data.num_classes == 3
    assert len(data.train_samples) == 15 and len(data.validation_samples) == 6
    batch = data.train_samples.batch(np.arange(15))
    assert batch["images"].shape == (15, 3, 16, 16) and batch["images"].dtype == torch.float32
    assert batch["labels"].bincount().tolist() == [5, 5, 5]
    validation = data.validation_samples.batch(np.arange(6))
    assert validation["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert data.describe()["epoch"] == "4 steps of 4 images"
    assert "15 to train on, 6 held out" in data.describe()["images"]


def test_the_key_follows_names_of_files_and_classes_and_augmentation(folder: Path) -> None:
    key = data_of(folder).key
    assert data_of(folder, "data.crop_pct=0.5", "data.num_workers=2").key == key
    assert data_of(folder, "data.hflip=0.0").key != key
    (folder / "train" / "bee" / "0.png").rename(folder / "train" / "bee" / "9.png")
    assert data_of(folder).key != key


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    try:
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / f"{name}.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    images = data_of(tmp_path).train_samples.batch(np.zeros(2, np.int64))["images"]  # type: ignore[union-attr]
    assert images.shape == (2, 3, 16, 16)


def test_a_sample_depends_on_seed_and_number_alone(folder: Path) -> None:
    mixing = ("task.mixup_alpha=0.8", "task.cutmix_alpha=1.0")
    for overrides in ((), mixing):
        samples = data_of(folder, *overrides).train_samples
        random.seed(1)
        torch.manual_seed(1)
        np.random.seed(1)
        again = data_of(folder, *overrides).train_samples
        batches = [samples.batch(np.arange(4 * i, 4 * i + 4)) for i in range(6)]
        assert all(equal(again.batch(np.arange(4 * i, 4 * i + 4)), batches[i]) for i in (5, 2, 0))
        assert not equal(data_of(folder, "seed=1", *overrides).train_samples.batch(np.arange(4)), batches[0])


def test_augmentation_differs_by_epoch(folder: Path) -> None:
    samples = data_of(folder).train_samples
    first, second = (samples.batch(np.arange(15) + 15 * epoch) for epoch in (0, 1))
    order = [samples.order(np.arange(15) + 15 * epoch).tolist() for epoch in (0, 1)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(15)) and order[0] != order[1]
    for place, item in enumerate(order[0]):
        assert not torch.equal(first["images"][place], second["images"][order[1].index(item)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_the_samples_of_a_step(folder: Path, num_workers: int) -> None:
    samples = data_of(folder, "data.num_aug_repeats=3").train_samples
    # Step 2 of a run with 4 samples per step, on one rank; and resumed there on two ranks, of 2 samples each.
    one = samples.batch(np.arange(8, 12))
    parts = [
        next(
            iter(
                DataLoader(
                    TrainBatches(samples, Share(2, 1, rank, 2, first_sample=8)),
                    batch_size=None,
                    sampler=range(2),
                    num_workers=num_workers,
                )
            )
        )
        for rank in (0, 1)
    ]
    assert equal(one, {name: torch.cat([part[name] for part in parts]) for name in one})


def test_repeats_are_augmented_differently(folder: Path) -> None:
    samples = data_of(folder, "data.num_aug_repeats=3").train_samples
    assert len(samples) == 45
    items = samples.order(np.arange(45))
    assert (items.reshape(15, 3) == items[::3, None]).all() and sorted(items[::3]) == list(range(15))
    images = samples.batch(np.arange(3))["images"]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    assert "each image 3 times" in data_of(folder, "data.num_aug_repeats=3").describe()["epoch"]


def test_a_corrupt_image_is_named_or_skipped(folder: Path) -> None:
    bad = folder / "train" / "bee" / "1.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"image .*train/bee/1\.JPEG cannot be read: .*data\.corrupt=skip"):
        data_of(folder).train_samples.batch(np.arange(15))
    samples = data_of(folder, "data.corrupt=skip").train_samples
    with pytest.warns(UserWarning, match=r"skipped image 1 of this process: image .*1\.JPEG"):
        batch = samples.batch(np.arange(15))
    assert batch["labels"].bincount().tolist() == [5, 5, 5]  # the next one of its class instead
    assert samples.images.num_skipped == 1

    bad = folder / "val" / "ant" / "0.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"val/ant/0\.png"):
        data_of(folder).validation_samples.batch(np.arange(6))
    with pytest.warns(UserWarning, match="skipped image 1"):
        batch = data_of(folder, "data.corrupt=skip").validation_samples.batch(np.arange(6))
    assert batch["labels"].tolist() == [-100, 0, 1, 1, 2, 2] and batch["images"].shape == (6, 3, 16, 16)


def test_no_readable_image_is_an_error_also_where_they_are_skipped(folder: Path) -> None:
    for file in (folder / "train").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="no image of"):
        data_of(folder, "data.corrupt=skip").train_samples.batch(np.arange(1))


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "dog").mkdir()
    with pytest.raises(
        DataError, match=r"not have the same classes: 1 are in one alone \(dog; dog in .*val\)"
    ):
        data_of(folder)
    (folder / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"train/dog has no images.* 1 of 4 classes"):
        data_of(folder)
    with pytest.raises(DataError, match=r"cannot read .*train \(No such file"):
        data_of(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.path: got ''"):
        build_data(
            compose_config(["experiment=none", "task=image_classification", "model=vit", "data=image_folder"])
        )


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.mean=[0.5,0.5]", "data.mean"),
        ("data.std=[0]", "data.std"),
        ("data.scale=[0.5,0.1]", "data.scale"),
        ("data.ratio=[0.75]", "data.ratio"),
        ("model.channels=4", "model.channels"),
    ],
)
def test_bad_options_are_named(folder: Path, override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace(".", r"\.")):
        data_of(folder, override)


def test_images_are_for_one_task(folder: Path) -> None:
    config = config_of(folder)
    config.task = compose_config(["experiment=none"]).task
    with pytest.raises(ConfigError, match="these data are for image_classification"):
        build_data(config)


def test_grey_images(folder: Path) -> None:
    batch = data_of(folder, "model.channels=1").train_samples.batch(np.arange(2))
    assert batch["images"].shape == (2, 1, 16, 16)


def test_evaluation_crops_the_middle() -> None:
    config = ImageFolderDataConfig(mean=[0.5], std=[0.25], crop_pct=0.5)
    transform = EvaluationTransform(config, image_size=8, channels=3)
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[4:12, 8:16] = 255
    image = transform(Image.fromarray(pixels), None)  # its shorter side is 8 / 0.5 already
    assert torch.equal(image, torch.full((3, 8, 8), 2.0))


def test_training_crops_are_within_their_limits() -> None:
    config = ImageFolderDataConfig(scale=[0.2, 0.5], ratio=[0.5, 2.0], hflip=0.5)
    transform = CropAndFlip(config, image_size=8, channels=3)
    for seed in range(50):
        left, top, right, bottom = transform._box((60, 40), np.random.default_rng(seed))
        across, down = right - left, bottom - top
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        assert 0.18 < across * down / 2400 < 0.53 and 0.47 < across / down < 2.1
    # No crop of this shape fits: the middle of the largest that does.
    square = ImageFolderDataConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0])
    assert CropAndFlip(square, image_size=8, channels=3)._box((60, 40), np.random.default_rng(0)) == (
        10,
        0,
        50,
        40,
    )


def test_shapes_of_training_crops_are_as_often_wide_as_high() -> None:
    config = ImageFolderDataConfig(scale=[0.01, 0.03], ratio=[0.25, 4.0])
    transform = CropAndFlip(config, image_size=8, channels=3)
    boxes = [transform._box((1000, 1000), np.random.default_rng(seed)) for seed in range(1000)]
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    # Uniform in the logarithm of the ratio, and in the area.
    assert abs(np.log(width / height).mean()) < 5 * np.log(4.0) / 3**0.5 / 1000**0.5
    assert abs((width * height).mean() - 0.02e6) < 5 * 0.01e6 / 3**0.5 / 1000**0.5 + 500
    for middle in ((left + right) / 2, (top + bottom) / 2):
        assert abs(middle.mean() - 500) < 5 * 300 / 1000**0.5


def test_what_needs_timm_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.data", None)
    with pytest.raises(DataError, match=r"timm, which augments images.*flash-attn-train\[images\]"):
        data_of(folder, "data.auto_augment=rand-m9-mstd0.5-inc1")


def test_steps_of_epochs() -> None:
    assert steps_of_epochs(300, 1_281_167, 1024) == 375_342
    assert steps_of_epochs(0.5, 100, 10) == 5


class TestTimm:
    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip(
            "timm.data", reason="augments images: pip install flash-attn-train[images]"
        )

    def test_every_augmentation_is_deterministic_and_leaves_no_trace(self, folder: Path) -> None:
        overrides = ("data=imagenet", "data.color_jitter=0.4", "data.interpolation=random")
        samples = data_of(folder, *overrides).train_samples
        states = random.getstate(), torch.get_rng_state()
        first = samples.batch(np.arange(8))
        assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
        random.seed(5)
        torch.manual_seed(5)
        assert equal(first, data_of(folder, *overrides).train_samples.batch(np.arange(8)))
        assert not equal(first, samples.batch(np.arange(15, 23)))

    @pytest.mark.parametrize(
        "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original-mstd0.5", "augmix-m5-w4-d2"]
    )
    def test_policies_at_their_strongest(self, policy: str) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
        transform = training_transform(ImageFolderDataConfig(auto_augment=policy), image_size=8, channels=3)
        assert all(transform(image, seed).isfinite().all() for seed in range(150))

    def test_each_option_changes_images(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))

        def transformed(**options: Any) -> list[torch.Tensor]:
            transform = training_transform(ImageFolderDataConfig(**options), image_size=16, channels=3)
            return [transform(image, seed) for seed in range(6)]

        plain = transformed(color_jitter=1e-9)
        for options in ({"auto_augment": "rand-m9"}, {"color_jitter": 0.4}, {"random_erasing": 1.0}):
            found = transformed(**options)
            assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True)), options
            assert all(a.shape == (3, 16, 16) for a in found)

    @pytest.mark.parametrize("size", [(40, 31), (31, 40), (16, 16), (500, 333)])
    def test_evaluation_is_timms(self, size: tuple[int, int], timm: Any) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        config = ImageFolderDataConfig()
        theirs = timm.create_transform((3, 16, 16), interpolation="bicubic", crop_pct=config.crop_pct)
        ours = EvaluationTransform(config, image_size=16, channels=3)
        torch.testing.assert_close(ours(image, None), theirs(image))


@pytest.fixture
def image_run(folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def build(*overrides: str) -> TrainConfig:
        own = [f"output_dir={tmp_path / 'run'}", "model.n_layer=1", "model.n_head=2", "model.d_model=16"]
        own += ["trainer.max_steps=6", "trainer.val_every_n_steps=3", "checkpoint.every_n_steps=2"]
        own += ["scheduler.decay_steps=6", "logger.tensorboard=false", "logger.every_n_steps=1"]
        own += ["task.mixup_alpha=0.8", "task.cutmix_alpha=1.0", "task.label_smoothing=0.1"]
        return config_of(folder, *own, *overrides)

    return build


def test_a_run_resumes_within_an_epoch(image_run: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from flash_attn_train.checkpoints import read_checkpoint
    from flash_attn_train.run import train

    whole = train(image_run(f"output_dir={tmp_path / 'whole'}"))
    train(image_run("trainer.max_steps=2"))
    with pytest.raises(
        CheckpointError, match=r"other training data: it was data\.hflip=0\.5; now it is data\.hflip=0"
    ):
        train(image_run("resume=true", "data.hflip=0"))
    resumed = train(image_run("resume=true", "data.num_workers=1"))
    states = [read_checkpoint(run.last_checkpoint)["state_dict"] for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole.samples == 24 and "val/accuracy_top5" in whole.last_val
