"""Scikit-learn's digits, and a vision transformer that learns them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flash_attn_train.cli import compose_config
from flash_attn_train.configs.image_data import DigitsDataConfig
from flash_attn_train.data import build_data
from flash_attn_train.data.images.digits import Digits
from flash_attn_train.errors import DataError

needs_sklearn = pytest.mark.usefixtures("sklearn")


@pytest.fixture
def sklearn() -> object:
    return pytest.importorskip("sklearn", reason="has the digits: pip install flash-attn-train[images]")


@needs_sklearn
def test_splits_are_stratified_disjoint_and_normalised() -> None:
    train, validation = (Digits(name, image_size=8, channels=1) for name in ("train", "validation"))
    assert len(train) + len(validation) == 1797
    shares = np.bincount(validation.labels) / (np.bincount(validation.labels) + np.bincount(train.labels))
    assert (abs(shares - 0.2) < 0.01).all()
    pixels = torch.stack([train.read(item, None)[0] for item in range(len(train))])
    assert pixels.shape == (len(train), 1, 8, 8)
    assert abs(float(pixels.mean())) < 1e-4 and abs(float(pixels.std()) - 1) < 1e-4
    assert train.fingerprint() != validation.fingerprint()


@needs_sklearn
def test_size_channels_and_shift() -> None:
    image, label = Digits("train", image_size=16, channels=3).read(0, 0)
    assert image.shape == (3, 16, 16) and label == 0
    still, moved = (
        Digits("train", image_size=8, channels=1),
        Digits("train", image_size=8, channels=1, max_shift=1),
    )
    plain = still.read(3, None)[0]
    assert torch.equal(moved.read(3, None)[0], plain)  # not in validation
    found = {tuple(moved.read(3, seed)[0].flatten().tolist()) for seed in range(60)}
    assert len(found) == 9 and tuple(plain.flatten().tolist()) in found


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"sklearn, which has the digits.*flash-attn-train\[images\]"):
        build_data(compose_config(["experiment=digits"]))


def test_a_trial_of_any_images_takes_digits() -> None:
    config = compose_config(["experiment=imagenet/vit-small", "smoke=true"])
    assert isinstance(config.data, DigitsDataConfig)


@needs_sklearn
def test_trial_of_imagenet_runs(tmp_path: Path) -> None:
    from flash_attn_train.run import train

    overrides = ["experiment=imagenet/vit-small", "smoke=true", f"output_dir={tmp_path}/run"]
    result = train(compose_config([*overrides, "logger.tensorboard=false", "data.num_workers=0"]))
    assert result.samples == 8 and "val/accuracy" in result.last_val


@needs_sklearn
def test_a_small_vit_learns_the_digits(tmp_path: Path) -> None:
    from flash_attn_train.run import train

    result = train(
        compose_config(["experiment=digits", f"output_dir={tmp_path}/run", "logger.tensorboard=false"])
    )
    assert result.last_val["val/accuracy"] > 0.95
