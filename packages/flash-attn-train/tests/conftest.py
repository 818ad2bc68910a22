"""A small corpus and a small run, shared by the tests of this package."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flash_attn_train.configs import (
    CheckpointConfig,
    GenerationConfig,
    GPTModelConfig,
    LoggerConfig,
    TextDataConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Runs a script, or ``"-m", module``, and its arguments on the CPU; returns what it printed. All must go well.

    ``ranks``: as so many processes of torchrun; None: as one process.
    """

    def run(*command: str, ranks: int | None) -> str:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *(torchrun if ranks is not None else []), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty text files of simple sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish"], ["sees", "hears", "likes", "finds"]
    for number in range(20):
        lines = [f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(60)]
        file = folder / f"part{number % 3}" / f"text{number:02d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + f"\nend of text {number}\n")
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("token_cache")


@pytest.fixture
def small_config(corpus_folder: Path, token_cache: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds a config that trains in about a second; keyword arguments ``section={...}`` change it."""

    def build(**changes: Any) -> TrainConfig:
        config = TrainConfig(
            output_dir=str(tmp_path / "run"),
            data=TextDataConfig(path=str(corpus_folder), val_fraction=0.2, cache_dir=str(token_cache)),
            tokenizer=TokenizerConfig(vocab_size=300),
            model=GPTModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=16),
            trainer=TrainerConfig(max_steps=6, batch_size=4, val_every_n_steps=3, val_sequences=8),
            logger=LoggerConfig(every_n_steps=1, tensorboard=False),
            checkpoint=CheckpointConfig(every_n_steps=2),
            generation=GenerationConfig(max_new_tokens=4),
        )
        for name, change in changes.items():
            if isinstance(change, dict):
                change = dataclasses.replace(getattr(config, name), **change)
            config = dataclasses.replace(config, **{name: change})
        if not isinstance(config.model, GPTModelConfig):  # no other writes a sample
            config = dataclasses.replace(config, generation=GenerationConfig())
        return config

    return build


@pytest.fixture(scope="session")
def standard_library_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the tests that train on the standard library, all with the smallest preset's tokenizer."""
    return tmp_path_factory.mktemp("standard_library_cache")
