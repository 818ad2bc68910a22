"""What can be found wrong with a run before it trains, and before it has written anything."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from flash_attn_models.tensor_parallel.heads import HeadPartition
from torch import nn

from flash_attn_train.configs import BertModelConfig, GPTModelConfig, TrainConfig, ViTModelConfig
from flash_attn_train.configs.model import HuggingFaceModelConfig
from flash_attn_train.configs.optimizer import AdamW8bitConfig
from flash_attn_train.configs.strategy import FSDP2Config, TensorParallelConfig
from flash_attn_train.data import DataModule
from flash_attn_train.data.module import StreamSource, check_samples
from flash_attn_train.distributed import data_parallel_size, on_rank_zero
from flash_attn_train.errors import ConfigError
from flash_attn_train.loggers import check_loggers
from flash_attn_train.metrics import build_metrics
from flash_attn_train.optim import build_scheduler, optimizer_recipe
from flash_attn_train.warm_start import check_warm_start


def check_machine(config: TrainConfig) -> None:
    """Looks for the devices and packages that a (resolved) config needs, and for what its strategy and callbacks
    cannot do: all that is found without the data, which may take hours to prepare.

    Raises:
        ConfigError: something will not work.
    """
    _check_devices(config)
    _check_tensor_parallel(config)
    _check_callbacks(config)
    check_loggers(config.logger)


def check_run(config: TrainConfig, model: nn.Module, data: DataModule) -> None:
    """Tries what the run will do with data, optimizer, schedule and warm start.

    All ranks call this. The weights to start from are looked at by the first one.

    Args:
        config: resolved.
        model: the whole model; on device "meta" will do.
        data: that it is to be trained on.

    Raises:
        UserError: something will not work, see :mod:`flash_attn_train.errors`.
    """
    _check_samples(config, data)
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


def _check_tensor_parallel(config: TrainConfig) -> None:
    strategy, model = config.strategy, config.model
    if not isinstance(strategy, TensorParallelConfig) or isinstance(model, HuggingFaceModelConfig):
        return
    ranks = strategy.tensor_parallel_size
    assert isinstance(model, (GPTModelConfig, BertModelConfig, ViTModelConfig))
    n_head_kv = (isinstance(model, GPTModelConfig) and model.n_head_kv) or model.n_head
    try:
        HeadPartition.of_heads(model.n_head, n_head_kv, 1, ranks)
    except ValueError as error:
        raise ConfigError(
            f"strategy.tensor_parallel_size: got {ranks} for model.n_head={model.n_head} and {n_head_kv} key and value "
            f"heads, expected at most {n_head_kv}, or a multiple of it up to model.n_head. Choose another size."
        ) from error
    if isinstance(model, ViTModelConfig) and strategy.sequence_parallel and config.trainer.batch_size % ranks:
        raise ConfigError(
            f"trainer.batch_size: got {config.trainer.batch_size}, expected a multiple of "
            f"strategy.tensor_parallel_size ({ranks}), among which the images are shared; or set "
            "strategy.sequence_parallel=false."
        )


def _check_samples(config: TrainConfig, data: DataModule) -> None:
    ranks = data_parallel_size(config)
    check_samples("validate", len(data.validation_samples), ranks)
    if not isinstance(data.train_samples, StreamSource):
        check_samples("train", len(data.train_samples), ranks)


def _check_callbacks(config: TrainConfig) -> None:
    callbacks = config.callbacks
    if callbacks.gpu_affinity and config.trainer.accelerator == "cuda" and find_spec("pynvml") is None:
        raise ConfigError(
            "callbacks.gpu_affinity: got true, but nvidia-ml-py is not installed; pip install flash-attn-train[nvml]."
        )
    measured = [f"val/{name}" for name in build_metrics(config.metrics, config.task)]
    stopping = callbacks.early_stopping
    if stopping.enabled and stopping.monitor not in measured:
        raise ConfigError(
            f"callbacks.early_stopping.monitor: got {stopping.monitor!r}, expected what a validation of this task "
            f"measures: {', '.join(measured)}."
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
