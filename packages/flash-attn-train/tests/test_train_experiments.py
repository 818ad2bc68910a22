"""Every entry of the groups that are YAML files composes, and says what its name does."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from flash_attn_train import cli
from flash_attn_train.configs import (
    BertModelConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    TrainConfig,
    ViTModelConfig,
)
from flash_attn_train.configs.store import FOLDER, entries
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.optim import build_scheduler

EXPERIMENTS = entries("experiment")
SIZES = {"gpt2s": "small", "gpt2m": "medium", "gpt2l": "large", "gpt2xl": "xl"}


@functools.cache
def compose_config(*arguments: str) -> TrainConfig:
    """Composed once: it takes a part of a second. Not to be changed."""
    return cli.compose_config(arguments)


def expected_experiments() -> set[str]:
    owt = {f"owt/{size}{kind}" for size in SIZES for kind in ("", "-flash", "-hf")}
    kinds = ("-flash", "-flash-8k", "-flash-rotary", "-flash-rotary-8k", "-hf")
    pile = {f"pile/gpt3{size}{kind}" for size in ("s", "m", "l", "xl", "-2.7B") for kind in kinds}
    wide = {f"pile/gpt3-2.7B-flash-hdim128{kind}" for kind in ("", "-8k", "-rotary", "-rotary-8k")}
    llama = {
        "llama/tinyllama-1.1b",
        "llama/llama-1b",
        "llama/llama-1b-8k",
        "llama/llama-1b-hf",
        "llama/llama-7b",
    }
    others = {"bert/base", "bert/large", "imagenet/vit-tiny", "imagenet/vit-small", "imagenet/vit-base"}
    short = {
        f"pile/gpt3{name}" for name in ("s-flash-rotary-30B", "m-flash-rotary-30B", "l-flash-rotary-30B")
    }
    short |= {"pile/gpt3xl-flash-rotary-60B", "pile/gpt3-2.7B-hf-hdim128"}
    return {
        *owt,
        *pile,
        *wide,
        *short,
        *llama,
        *others,
        "quickstart",
        "smoke",
        "digits",
        "stdlib-bert",
        "none",
    }


def test_the_experiments_are_there() -> None:
    assert expected_experiments() <= set(EXPERIMENTS)


def test_every_file_is_an_entry() -> None:
    files = [file for file in FOLDER.rglob("*.yaml") if file.relative_to(FOLDER).parts[0] == "experiment"]
    assert len(files) == len(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_composes(name: str) -> None:
    config = compose_config(f"experiment={name}")
    # Runs of two experiments never share a folder, and say what they are.
    assert config.output_dir == ("runs/train" if name == "none" else f"runs/{name}")
    # Batches divide up on one device and on the eight of a machine.
    trainer = config.trainer
    if trainer.global_batch_size is not None:
        assert trainer.global_batch_size % (8 * trainer.batch_size) == 0
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=config.optimizer.lr)
    build_scheduler(config.scheduler, optimizer, trainer.max_steps)


@pytest.mark.parametrize(("name", "tokens"), [("s-flash-rotary-30B", 30), ("xl-flash-rotary-60B", 60)])
def test_shorter_runs_see_as_many_tokens_as_they_say(name: str, tokens: int) -> None:
    config = compose_config(f"experiment=pile/gpt3{name}")
    assert config.trainer.global_batch_size is not None and isinstance(config.model, GPTModelConfig)
    samples = config.trainer.max_steps * config.trainer.global_batch_size
    assert samples * config.model.max_seqlen == pytest.approx(tokens * 1e9, rel=0.06)
    assert config.scheduler.decay_steps == config.trainer.max_steps


@pytest.mark.parametrize("mode", entries("mode"))
@pytest.mark.parametrize("name", ["owt/gpt2s", "llama/llama-1b-hf", "stdlib-bert", "digits"])
def test_every_mode_goes_with_every_kind_of_task(name: str, mode: str) -> None:
    config = compose_config(f"experiment={name}", f"mode={mode}")
    if mode == "default":
        assert config == compose_config(f"experiment={name}")
    else:
        assert config.trainer.max_steps <= 50


def test_mode_wins_over_the_experiment_and_the_command_line_over_both() -> None:
    assert compose_config("experiment=owt/gpt2s", "mode=debug").trainer.max_steps == 20
    assert compose_config("experiment=owt/gpt2s", "mode=debug", "trainer.max_steps=7").trainer.max_steps == 7


def compose_model(name: str) -> Any:
    # The experiment of the default sets sizes of a decoder.
    config = compose_config(f"model={name}", "experiment=none", *_task_of(name))
    return config.model


def _task_of(name: str) -> list[str]:
    if name.startswith("bert"):
        return ["task=masked_lm"]
    return ["task=image_classification"] if name.startswith("vit") else []


def test_trainers_leave_the_length_to_the_experiment() -> None:
    for name in entries("trainer"):
        trainer = compose_config("experiment=owt/gpt2s", f"trainer={name}").trainer
        assert (trainer.max_steps, trainer.devices) == (400_000, 8 if name == "gpu8" else 1)


@pytest.mark.parametrize("name", entries("model"))
def test_every_model_composes(name: str) -> None:
    compose_model(name)


# Published counts, of vocabularies without padding. Those of GPT-3's sizes are, with L layers of width D, 12 L D^2 (the
# matrices), 13 L D (biases and norms), the embeddings of 50257 tokens and 2048 positions, and the last norm.
def _gpt3(n_layer: int, d_model: int) -> int:
    return n_layer * (12 * d_model**2 + 13 * d_model) + (50257 + 2048) * d_model + 2 * d_model


COUNTS = {
    "gpt2-small": (50257, 124_439_808),
    "gpt2-medium": (50257, 354_823_168),
    "gpt2-large": (50257, 774_030_080),
    "gpt2-xl": (50257, 1_557_611_200),
    "gpt3-small": (50257, _gpt3(12, 768)),
    "gpt3-medium": (50257, _gpt3(24, 1024)),
    "gpt3-large": (50257, _gpt3(24, 1536)),
    "gpt3-xl": (50257, _gpt3(24, 2048)),
    "gpt3-2.7b": (50257, _gpt3(32, 2560)),
    "gpt3-2.7b-hdim128": (50257, _gpt3(32, 2560)),
    "tinyllama-1.1b": (32000, 1_100_048_384),
    "llama-1b": (128256, 1_235_814_400),
    "llama-7b": (32000, 6_738_415_616),
    # Without pooler and next-sentence head, with the masked-LM head.
    "bert-base": (30522, 109_514_298),
    "bert-large": (30522, 335_174_458),
    "vit-tiny-patch16-224": (0, 5_717_416),
    "vit-small-patch16-224": (0, 22_050_664),
    "vit-base-patch16-224": (0, 86_567_656),
    "vit-large-patch16-224": (0, 304_326_632),
}


@pytest.mark.parametrize(("name", "vocab_size", "count"), [(name, *value) for name, value in COUNTS.items()])
def test_named_sizes_have_the_published_number_of_parameters(name: str, vocab_size: int, count: int) -> None:
    model = compose_model(name)
    if isinstance(model, GPTModelConfig | BertModelConfig):
        model = dataclasses.replace(model, pad_vocab_multiple=1)
    sizes = DataSizes(vocab_size=vocab_size, num_classes=1000 if isinstance(model, ViTModelConfig) else 0)
    built = build_model(model, sizes, device="meta")
    assert sum(parameter.numel() for parameter in built.parameters()) == count


@pytest.mark.parametrize("name", [name for name in entries("model") if name.startswith("hf-")])
def test_models_of_transformers_are_as_large_as_ours(name: str) -> None:
    pytest.importorskip("transformers")
    theirs = compose_model(name)
    assert isinstance(theirs, HuggingFaceModelConfig)
    vocab_size = COUNTS[name.removeprefix("hf-")][0]
    with torch.device("meta"):
        built = build_model(theirs, DataSizes(vocab_size=vocab_size))
    assert sum(parameter.numel() for parameter in built.parameters()) == COUNTS[name.removeprefix("hf-")][1]


def _values(config: TrainConfig, *names: str) -> dict[str, Any]:
    return {
        name: getattr(getattr(config, section), name)
        for name in names
        for section in ("model", "optimizer", "scheduler", "trainer")
        if hasattr(getattr(config, section), name)
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("owt/gpt2s", {"lr": 6e-4, "global_batch_size": 512, "max_steps": 400_000, "warmup_steps": 4000}),
        ("owt/gpt2xl", {"n_layer": 48, "lr": 2e-4, "global_batch_size": 512, "max_seqlen": 1024}),
        (
            "pile/gpt3s-flash",
            {"lr": 6e-4, "global_batch_size": 256, "max_steps": 800_000, "decay_steps": 600_000},
        ),
        ("pile/gpt3m-flash-8k", {"lr": 3e-4, "global_batch_size": 64, "max_seqlen": 8192, "n_layer": 24}),
        ("pile/gpt3s-flash-rotary-8k", {"position": "rotary", "rotary_fraction": 0.5, "max_seqlen": 8192}),
        ("pile/gpt3xl-flash", {"lr": 2e-4, "global_batch_size": 512, "max_steps": 400_000, "d_model": 2048}),
        ("pile/gpt3-2.7B-flash", {"n_head": 32, "lr": 1.6e-4, "min_lr_ratio": 0.1}),
        (
            "pile/gpt3-2.7B-flash-hdim128-rotary-8k",
            {"n_head": 20, "position": "rotary", "global_batch_size": 128},
        ),
        (
            "imagenet/vit-base",
            {"lr": 1e-3, "weight_decay": 0.05, "global_batch_size": 1024, "drop_path": 0.1},
        ),
    ],
)
def test_values_of_experiments(name: str, values: dict[str, Any]) -> None:
    assert _values(compose_config(f"experiment={name}"), *values) == values


@pytest.mark.parametrize("size", [*SIZES])
def test_flash_is_another_name(size: str) -> None:
    plain, flash = (compose_config(f"experiment=owt/{size}{kind}") for kind in ("", "-flash"))
    assert dataclasses.replace(flash, output_dir=plain.output_dir) == plain


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("-hf")])
def test_experiments_with_transformers_differ_in_the_model_alone(name: str) -> None:
    ours = name.removesuffix("-hf") + ("-flash" if name.startswith("pile/") else "")
    config, other = compose_config(f"experiment={name}"), compose_config(f"experiment={ours}")
    assert isinstance(config.model, HuggingFaceModelConfig)
    same = {"output_dir": other.output_dir, "model": other.model}
    assert dataclasses.replace(config, **same) == other


def test_quickstart_takes_architectures_with_and_without_sizes() -> None:
    for name, norm, width in (
        ("gpt2", "layer_norm", 256),
        ("llama", "rms_norm", 256),
        ("gpt2-mini", "layer_norm", 128),
        ("llama-mini", "rms_norm", 128),
    ):
        model = compose_config("experiment=quickstart", f"model={name}").model
        assert isinstance(model, GPTModelConfig) and (model.norm, model.d_model) == (norm, width)


def test_head_dimension_of_the_quickstart_is_one_that_the_fastest_kernels_take() -> None:
    model = compose_config().model
    assert isinstance(model, GPTModelConfig) and model.d_model / model.n_head in (64, 128)
