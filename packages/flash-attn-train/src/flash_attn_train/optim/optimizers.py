"""From a config of the optimizer group to an optimizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flash_attn_train.configs.optimizer import (
    AdamW8bitConfig,
    AdamWConfig,
    LambConfig,
    OptimizerConfig,
    SGDConfig,
)
from flash_attn_train.errors import ConfigError
from flash_attn_train.optim.lamb import Lamb
from flash_attn_train.optim.param_groups import param_groups


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer that is not made yet, for those who wrap one, as ZeRO-1 does.

    Attributes:
        cls: its class; ``cls(groups, **options)`` makes it.
        groups: parameter groups.
        options: the other arguments.
    """

    cls: type[Optimizer]
    groups: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Optimizer:
        return self.cls(self.groups, **self.options)


def build_optimizer(config: OptimizerConfig, model: nn.Module, *, fused: bool = True) -> Optimizer:
    """The optimizer of the model's parameters, in the groups of :func:`param_groups`.

    Args:
        config: kind and numbers.
        model: on the device it is trained on, sharded already if it is to be.
        fused: use torch's fused step where there is one. Not with 16-mixed: the fused step un-scales gradients itself,
            which is after clipping.

    Raises:
        ConfigError: groups that cannot be made, a missing library, or a device or sharding it cannot work on.
    """
    return optimizer_recipe(config, model, fused=fused).build()


@functools.singledispatch
def optimizer_recipe(config: OptimizerConfig, model: nn.Module, *, fused: bool = True) -> OptimizerRecipe:
    """Class and arguments of what :func:`build_optimizer` builds."""
    raise TypeError(f"no optimizer is registered for a {type(config).__name__}")


@optimizer_recipe.register
def _(config: AdamWConfig, model: nn.Module, *, fused: bool = True) -> OptimizerRecipe:
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": fused}
    return OptimizerRecipe(torch.optim.AdamW, param_groups(model, config), options)


@optimizer_recipe.register
def _(config: AdamW8bitConfig, model: nn.Module, *, fused: bool = True) -> OptimizerRecipe:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"optimizer: got adamw_8bit, which needs bitsandbytes ({error}); install it with `pip install "
            "flash-attn-train[bitsandbytes]`, or use optimizer=adamw."
        ) from error
    for parameter in model.parameters():
        # On device "meta" a model is only looked at.
        if isinstance(parameter, DTensor) or parameter.device.type not in ("cuda", "meta"):
            place = "a sharded model" if isinstance(parameter, DTensor) else f"device {parameter.device}"
            raise ConfigError(
                f"optimizer: got adamw_8bit for {place}, expected whole parameters on an NVIDIA GPU (one device or "
                "DDP); use optimizer=adamw."
            )
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "is_paged": config.paged,
    }
    return OptimizerRecipe(AdamW8bit, param_groups(model, config), options)


@optimizer_recipe.register
def _(config: LambConfig, model: nn.Module, *, fused: bool = True) -> OptimizerRecipe:
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "adapt_undecayed": config.adapt_undecayed,
    }
    return OptimizerRecipe(Lamb, param_groups(model, config), options)


@optimizer_recipe.register
def _(config: SGDConfig, model: nn.Module, *, fused: bool = True) -> OptimizerRecipe:
    if config.nesterov and config.momentum == 0.0:
        raise ConfigError(
            "optimizer.nesterov: got true with optimizer.momentum=0.0, expected a momentum above 0; give one, or leave "
            "nesterov out."
        )
    options = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "fused": fused,
    }
    return OptimizerRecipe(torch.optim.SGD, param_groups(model, config), options)
