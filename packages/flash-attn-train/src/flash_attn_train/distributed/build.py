"""From the options of the strategy group to a strategy of Lightning's."""

from __future__ import annotations

from datetime import timedelta
from functools import singledispatch
from typing import Any

import torch
from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from flash_attn_train.configs.model import GPTModelConfig, HuggingFaceModelConfig, ModelConfig
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.strategy import (
    AutoStrategyConfig,
    DDPConfig,
    DistributedConfig,
    FSDP2Config,
    SingleDeviceConfig,
    StrategyConfig,
    TensorParallelConfig,
    Zero1Config,
)
from flash_attn_train.distributed.strategies import DataParallelStrategy, MeshStrategy, Zero1Strategy
from flash_attn_train.errors import ConfigError

_HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
# Lightning's choice for ModelParallelStrategy.
_MESH_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@singledispatch
def build_strategy(config: StrategyConfig, train_config: TrainConfig) -> Strategy:
    """The strategy for a (resolved) config.

    Raises:
        ConfigError: it does not go with trainer.devices, num_nodes, precision or accelerator.
    """
    raise TypeError(f"config: got {type(config).__name__}, expected a config of the strategy group.")


@build_strategy.register
def _(config: SingleDeviceConfig, train_config: TrainConfig) -> Strategy:
    if _num_devices(train_config) > 1:
        raise ConfigError(
            f"strategy: got single, but trainer.devices * trainer.num_nodes is {_num_devices(train_config)}; "
            "expected 1 device, or another strategy such as ddp."
        )
    device = "cuda:0" if train_config.trainer.accelerator == "cuda" else "cpu"
    return SingleDeviceStrategy(torch.device(device))


@build_strategy.register
def _(config: AutoStrategyConfig, train_config: TrainConfig) -> Strategy:
    if _num_devices(train_config) == 1:
        return build_strategy(SingleDeviceConfig(), train_config)
    return DataParallelStrategy(**_ddp_options(config, train_config))


@build_strategy.register
def _(config: DDPConfig, train_config: TrainConfig) -> Strategy:
    return DataParallelStrategy(**_ddp_options(config, train_config))


@build_strategy.register
def _(config: Zero1Config, train_config: TrainConfig) -> Strategy:
    return Zero1Strategy(sharded_checkpoints=config.sharded_checkpoints, **_ddp_options(config, train_config))


@build_strategy.register
def _(config: FSDP2Config, train_config: TrainConfig) -> Strategy:
    _check_mesh_precision("fsdp2", train_config)
    return MeshStrategy(
        tensor_parallel_size=1, sharded_checkpoints=config.sharded_checkpoints, timeout=_timeout(config)
    )


@build_strategy.register
def _(config: TensorParallelConfig, train_config: TrainConfig) -> Strategy:
    _check_mesh_precision("tensor_parallel", train_config)
    _check_model(config, train_config.model)
    return MeshStrategy(
        tensor_parallel_size=config.tensor_parallel_size, sharded_checkpoints=False, timeout=_timeout(config)
    )


def data_parallel_size(config: TrainConfig) -> int:
    """How many ranks have different data: what the global batch is shared among."""
    shared = config.strategy.tensor_parallel_size if isinstance(config.strategy, TensorParallelConfig) else 1
    devices = _num_devices(config)
    if devices % shared:
        raise ConfigError(
            f"strategy.tensor_parallel_size: got {shared}, expected a divisor of the {devices} devices of the run "
            "(trainer.devices * trainer.num_nodes)."
        )
    return devices // shared


def _num_devices(config: TrainConfig) -> int:
    return config.trainer.devices * config.trainer.num_nodes


def _timeout(config: DistributedConfig) -> timedelta:
    return timedelta(minutes=config.timeout_minutes)


def _ddp_options(config: DDPConfig, train_config: TrainConfig) -> dict[str, Any]:
    if config.compression == "bf16" and train_config.trainer.accelerator == "cpu":
        raise ConfigError(
            "strategy.compression: got 'bf16', which torch has for GPUs only; expected none or fp16."
        )
    return {
        "find_unused_parameters": False,
        "gradient_as_bucket_view": True,
        "static_graph": config.static_graph,
        "bucket_cap_mb": config.bucket_mb,
        "ddp_comm_hook": _HOOKS.get(config.compression),
        "timeout": _timeout(config),
    }


def _check_mesh_precision(name: str, config: TrainConfig) -> None:
    if config.trainer.precision not in _MESH_PRECISIONS:
        raise ConfigError(
            f"trainer.precision: got {config.trainer.precision!r}, expected one of {', '.join(_MESH_PRECISIONS)} with "
            f"strategy={name}, or strategy=ddp."
        )


def _check_model(config: TensorParallelConfig, model: ModelConfig) -> None:
    ranks = config.tensor_parallel_size
    if isinstance(model, HuggingFaceModelConfig) and ranks > 1:
        raise ConfigError(
            "strategy: got tensor_parallel for a model of transformers; expected a model of flash_attn_models, or "
            "strategy=fsdp2."
        )
    if config.sequence_parallel and isinstance(model, GPTModelConfig) and model.max_seqlen % ranks:
        raise ConfigError(
            f"model.max_seqlen: got {model.max_seqlen}, expected a multiple of strategy.tensor_parallel_size "
            f"({ranks}), among which each sequence is shared; or set strategy.sequence_parallel=false."
        )
