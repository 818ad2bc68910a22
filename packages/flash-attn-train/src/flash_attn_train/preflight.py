"""What can be found wrong with a run before it trains, and before it has written anything."""

from __future__ import annotations

import torch
from torch import nn

from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.optimizer import AdamW8bitConfig
from flash_attn_train.configs.strategy import FSDP2Config
from flash_attn_train.distributed import on_rank_zero
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import check_loggers
from flash_attn_train.optim import build_scheduler, optimizer_recipe
from flash_attn_train.warm_start import check_warm_start


def check_run(config: TrainConfig, model: nn.Module) -> None:
    """Tries what the run will do with devices, loggers, optimizer, schedule and warm start.

    All ranks call this. The weights to start from are looked at by the first one.

    Args:
        config: resolved.
        model: the whole model; on device "meta" will do.

    Raises:
        UserError: something will not work, see :mod:`flash_attn_train.errors`.
    """
    _check_devices(config)
    check_loggers(config.logger)
    _check_optimizer(config, model)
    _check_schedule(config)
    source, skip = config.model.warm_start, config.model.warm_start_skip
    if source is not None:
        on_rank_zero(
            lambda: check_warm_start(model, source, skip=skip), accelerator=config.trainer.accelerator
        )


def _check_devices(config: TrainConfig) -> None:
    if config.trainer.accelerator != "cuda":
        return
    found = torch.cuda.device_count()
    if config.trainer.devices > found:
        raise ConfigError(
            f"trainer.devices: got {config.trainer.devices}, but torch finds {found} on this machine; expected at most "
            "as many. Machines are trainer.num_nodes."
        )


def _check_optimizer(config: TrainConfig, model: nn.Module) -> None:
    optimizer_recipe(config.optimizer, model, fused=False)
    is_sharded = isinstance(config.strategy, FSDP2Config)
    if isinstance(config.optimizer, AdamW8bitConfig) and (config.trainer.accelerator == "cpu" or is_sharded):
        place = "a sharded model" if is_sharded else "the CPU"
        raise ConfigError(
            f"optimizer: got adamw_8bit for {place}, expected whole parameters on an NVIDIA GPU (one device or DDP); "
            "use optimizer=adamw."
        )


def _check_schedule(config: TrainConfig) -> None:
    # A schedule knows rates alone.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    trainer = config.trainer
    build_scheduler(
        config.scheduler, stand_in, trainer.max_steps, val_every_n_steps=trainer.val_every_n_steps
    )
