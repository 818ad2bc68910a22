"""From the options of the strategy group to strategies, and what is done to models for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models.gpt import GPTConfig, GPTLMHeadModel
from flash_attn_train.configs import store
from flash_attn_train.configs.model import HuggingFaceModelConfig
from flash_attn_train.configs.schema import TrainConfig, TrainerConfig
from flash_attn_train.configs.strategy import STRATEGIES, SingleDeviceConfig, StrategyConfig
from flash_attn_train.distributed import (
    build_strategy,
    clip_gradients,
    data_parallel_size,
    distribute_optimizer,
    model_options,
    parallelize,
    seed_rank,
)
from flash_attn_train.distributed.parallelize import layers
from flash_attn_train.distributed.strategies import DataParallelStrategy, MeshStrategy, Zero1Strategy
from flash_attn_train.errors import ConfigError
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn


def config(strategy: str, options: dict[str, Any] | None = None, **trainer: Any) -> TrainConfig:
    settings = {"accelerator": "cpu", "precision": "32-true", **trainer}
    return TrainConfig(strategy=STRATEGIES[strategy](**(options or {})), trainer=TrainerConfig(**settings))


def build(*args: Any, **kwargs: Any) -> Any:
    made = config(*args, **kwargs)
    return build_strategy(made.strategy, made)


def small_model(**changes: Any) -> GPTLMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "max_seqlen": 8, "n_layer": 2, "n_head": 2, "d_model": 16, **changes}
    return GPTLMHeadModel(GPTConfig(**shape))


@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [
        ("auto", 1, SingleDeviceStrategy),
        ("auto", 2, DataParallelStrategy),
        ("single", 1, SingleDeviceStrategy),
        ("ddp", 1, DataParallelStrategy),
        ("ddp", 4, DataParallelStrategy),
        ("zero1", 2, Zero1Strategy),
        ("fsdp2", 2, MeshStrategy),
        ("tensor_parallel", 4, MeshStrategy),
    ],
)
def test_kinds(name: str, devices: int, kind: type) -> None:
    assert type(build(name, devices=devices)) is kind


def test_every_schema_builds() -> None:
    for name in STRATEGIES:
        build(name, devices=1 if name == "single" else 2)
    with pytest.raises(TypeError, match="strategy group"):
        build_strategy(StrategyConfig(), TrainConfig())


def test_ddp_options_arrive() -> None:
    options = {"static_graph": True, "compression": "fp16", "bucket_mb": 50.0, "timeout_minutes": 2.0}
    strategy = build("ddp", options, devices=2)
    assert strategy._ddp_kwargs == {
        "find_unused_parameters": False,
        "gradient_as_bucket_view": True,
        "static_graph": True,
        "bucket_cap_mb": 50.0,
    }
    assert strategy._ddp_comm_hook.__name__ == "fp16_compress_hook"
    assert strategy._timeout.total_seconds() == 120
    assert build("ddp", devices=2)._ddp_comm_hook is None


@pytest.mark.parametrize(
    ("arguments", "trainer", "message"),
    [
        (("single",), {"devices": 2}, r"strategy: got single, but trainer\.devices"),
        (("ddp", {"compression": "bf16"}), {"devices": 2}, r"strategy\.compression: got 'bf16'"),
        (
            ("fsdp2",),
            {"devices": 2, "precision": "16-mixed"},
            r"trainer\.precision: got '16-mixed', expected one",
        ),
        (("tensor_parallel",), {"devices": 2, "precision": "16-mixed"}, r"with strategy=tensor_parallel"),
        (
            ("tensor_parallel", {"tensor_parallel_size": 3}),
            {"devices": 3},
            r"model\.max_seqlen: got 256, expected a multiple",
        ),
    ],
)
def test_what_does_not_go_together(arguments: tuple, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*arguments, **trainer)


def test_tensor_parallel_needs_our_models() -> None:
    made = dataclasses.replace(config("tensor_parallel", devices=2), model=HuggingFaceModelConfig())
    with pytest.raises(ConfigError, match="a model of transformers"):
        build_strategy(made.strategy, made)


def test_data_parallel_size() -> None:
    assert data_parallel_size(config("ddp", devices=4, num_nodes=2)) == 8
    assert data_parallel_size(config("tensor_parallel", devices=4)) == 2
    with pytest.raises(ConfigError, match="a divisor of the 3 devices"):
        data_parallel_size(config("tensor_parallel", devices=3))


def test_config_files() -> None:
    files = sorted(path.stem for path in (Path(store.FOLDER) / "strategy").glob("*.yaml"))
    assert files == ["ddp-bf16", "ddp-fp16", "zero1-sharded", "zero2", "zero3"]
    for name in (*files, *STRATEGIES):
        chosen = store.compose([f"strategy={name}"]).strategy
        assert set(chosen) <= {
            field.name for kind in STRATEGIES.values() for field in dataclasses.fields(kind)
        }
    assert store.compose(["strategy=zero2"]).strategy.reshard_after_forward is False
    assert store.compose(["strategy=ddp-bf16"]).strategy.compression == "bf16"


def test_layers_and_names_after_compiling() -> None:
    model = small_model()
    before = list(model.state_dict())
    assert list(layers(model)) == list(model.transformer.layers)
    parallelize(model, config("single", compile=True, activation_checkpointing="layers"))
    assert list(model.state_dict()) == before
    assert model.transformer.activation_checkpointing is True
    assert all(layer._compiled_call_impl is not None for layer in layers(model))


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    tokens = torch.arange(16).view(2, 8) % 50
    gradients = []
    for what in ("none", "layers", "attention", "mlp"):
        model = parallelize(small_model(), config("single", activation_checkpointing=what))
        model.loss(tokens, tokens).backward()  # type: ignore[operator]
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_activation_checkpointing_of_others() -> None:
    class Theirs(nn.Linear):
        asked: Any = None

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any) -> None:
            self.asked = gradient_checkpointing_kwargs

    model = Theirs(1, 1)
    parallelize(model, config("single", activation_checkpointing="layers"))
    assert model.asked == {"use_reentrant": False}
    with pytest.raises(ConfigError, match="got 'mlp' for a Theirs, expected none or layers"):
        parallelize(model, config("single", activation_checkpointing="mlp"))
    with pytest.raises(ConfigError, match="Linear has none"):
        parallelize(nn.Linear(1, 1), config("single", activation_checkpointing="layers"))


def test_clipping_in_one_process_is_torchs() -> None:
    model, reference = nn.Linear(4, 4), nn.Linear(4, 4)
    for module in (model, reference):
        for p in module.parameters():
            p.grad = torch.full_like(p, 2.0)
    norm = clip_gradients(model, 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0))
    assert norm == torch.tensor(2.0 * 20**0.5)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip_gradients(model, float("inf"))
    assert all(
        torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad is not None
    )


def test_one_process_needs_nothing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert distribute_optimizer(optimizer, SingleDeviceStrategy()) is optimizer
    assert model_options(SingleDeviceConfig(), None) == {}


def test_ranks_draw_different_numbers() -> None:
    def draw(*where: int) -> float:
        seed_rank(*where)
        return torch.rand(1).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(0, 5, 0), draw(0, 5, 1), draw(0, 6, 1), draw(1, 5, 1)}) == 4
