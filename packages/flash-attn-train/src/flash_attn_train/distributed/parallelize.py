"""What is done to a model so that it trains as the trainer and strategy groups say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import torch
from flash_attn_models.gpt import GPTLMHeadModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.strategy import FSDP2Config, StrategyConfig, TensorParallelConfig
from flash_attn_train.distributed.mesh import DATA_PARALLEL, data_parallel_mesh, tensor_parallel_mesh
from flash_attn_train.errors import ConfigError

# Methods of models, besides forward, that tasks call.
_ENTRANCES = ("loss",)


def parallelize(model: nn.Module, config: TrainConfig, mesh: DeviceMesh | None = None) -> nn.Module:
    """Activation checkpointing, compilation of each layer and FSDP2, in this order, in place.

    Names of parameters and of entries in checkpoints stay as they are. With FSDP2 parameters become DTensors on the
    mesh's devices, layer by layer.

    Args:
        model: with its weights, the same on all data-parallel ranks; the tensor-parallel part of this rank, if
            that is cut (see :func:`model_options`).
        config: sections trainer and strategy are read.
        mesh: Lightning's, of ``LightningModule.device_mesh``; None for strategies without one.

    Raises:
        ConfigError: the model has no activation checkpointing, or not of this part.
    """
    if config.trainer.activation_checkpointing != "none":
        _checkpoint_activations(model, config.trainer.activation_checkpointing)
    if config.trainer.compile:
        for layer in layers(model):
            layer.compile()  # in place, unlike torch.compile: names stay
    if mesh is not None:
        _shard(config.strategy, model, config.trainer.precision, mesh)
    return model


def model_options(config: StrategyConfig, mesh: DeviceMesh | None) -> dict[str, Any]:
    """What the constructors of flash_attn_models must be told for this strategy: process_group, sequence_parallel."""
    shards = tensor_parallel_mesh(mesh)
    if not isinstance(config, TensorParallelConfig) or shards is None:
        return {}
    return {"process_group": shards.get_group(), "sequence_parallel": config.sequence_parallel}


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformer: the elements of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def _checkpoint_activations(model: nn.Module, what: str) -> None:
    if what != "layers" and not isinstance(model, GPTLMHeadModel):
        raise ConfigError(
            f"trainer.activation_checkpointing: got {what!r} for a {type(model).__name__}, expected none or layers; "
            "only a GPT has it for parts of its layers."
        )
    ours: list[Any] = [module for module in model.modules() if hasattr(module, "activation_checkpointing")]
    for module in ours:
        module.activation_checkpointing = True if what == "layers" else what
    if ours:
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if not callable(enable):
        raise ConfigError(
            f"trainer.activation_checkpointing: got {what!r}, but {type(model).__name__} has none; set it to none."
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@singledispatch
def _shard(config: StrategyConfig, model: nn.Module, precision: str, mesh: DeviceMesh) -> None:
    raise TypeError(f"strategy: got {type(config).__name__}, expected one that has a device mesh.")


@_shard.register
def _(config: FSDP2Config, model: nn.Module, precision: str, mesh: DeviceMesh) -> None:
    _fully_shard(config, model, precision, mesh)


@_shard.register
def _(config: TensorParallelConfig, model: nn.Module, precision: str, mesh: DeviceMesh) -> None:
    # The tensor-parallel part was made with the model.
    if data_parallel_mesh(mesh) is not None:
        _fully_shard(config, model, precision, mesh)


def _fully_shard(
    config: FSDP2Config | TensorParallelConfig, model: nn.Module, precision: str, mesh: DeviceMesh
) -> None:
    policy = MixedPrecisionPolicy(
        # Under bf16-mixed it is the bf16 copies that travel. Autocast, which Lightning keeps on, would make the same
        # copies and keeps norms and losses in fp32.
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=getattr(torch, config.reduce_dtype),
        cast_forward_inputs=False,
    )
    # Layers return views, and nothing is done in place to what they return.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options: dict[str, Any] = {"mesh": mesh[DATA_PARALLEL], "mp_policy": policy}
    for layer in layers(model):
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    # What belongs to no layer, embeddings and head, is used at both ends: it stays gathered in between.
    fully_shard(model, reshard_after_forward=False, **options)
    for name in _ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
