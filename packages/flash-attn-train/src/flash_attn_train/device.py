"""What a config's ``auto`` and null values mean on this machine."""

from __future__ import annotations

import dataclasses
import os
import platform

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment

from flash_attn_train.configs import TrainConfig, check_config
from flash_attn_train.data.images import steps_of_epochs
from flash_attn_train.distributed import data_parallel_size
from flash_attn_train.errors import ConfigError

_COMPUTE_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}


def resolve(config: TrainConfig) -> TrainConfig:
    """A copy with devices, precision, batches and schedule as definite values.

    Started by torchrun, the run has the devices that torchrun has made processes for. A length in epochs is left to
    :func:`resolve_epochs`, and with it the schedule.

    Raises:
        ConfigError: a GPU is asked for and there is none, or it cannot compute in the precision asked for, or the
            global batch cannot be made of whole forward passes on all devices.
    """
    config = _with_torchrun_devices(config)
    trainer = config.trainer
    accelerator = trainer.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator: got 'cuda', but torch finds no CUDA device. Use auto or cpu, or install a "
            "torch built for CUDA and a driver."
        )
    has_bf16 = accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if has_bf16 else "32-true"
    if precision == "16-mixed" and accelerator == "cpu":
        raise ConfigError(
            "trainer.precision: got '16-mixed', which needs a GPU; expected 32-true or bf16-mixed."
        )
    if precision.startswith("bf16") and accelerator == "cuda" and not has_bf16:
        raise ConfigError(
            f"trainer.precision: got {precision!r}, but this GPU has no bf16; expected 32-true or 16-mixed."
        )
    trainer = dataclasses.replace(
        trainer,
        accelerator=accelerator,
        precision=precision,
        accumulate_grad_batches=_accumulation(config),
        global_batch_size=None,
    )
    config = dataclasses.replace(config, trainer=trainer)
    return config if trainer.max_epochs is not None else _with_schedule(config)


def resolve_epochs(config: TrainConfig, num_samples: int) -> TrainConfig:
    """A copy of an otherwise resolved config with trainer.max_epochs as steps: the least that see each of so many
    samples so often. The last step may go a little beyond, and the schedule ends with it.

    Raises:
        ConfigError: the schedule does not fit into so few steps.
    """
    trainer = config.trainer
    assert trainer.max_epochs is not None
    global_batch_size = trainer.batch_size * trainer.accumulate_grad_batches * data_parallel_size(config)
    max_steps = steps_of_epochs(trainer.max_epochs, num_samples, global_batch_size)
    trainer = dataclasses.replace(trainer, max_steps=max_steps, max_epochs=None)
    config = dataclasses.replace(config, trainer=trainer)
    check_config(config)
    return _with_schedule(config)


def _with_schedule(config: TrainConfig) -> TrainConfig:
    scheduler = config.scheduler
    decay_steps = scheduler.decay_steps or config.trainer.max_steps
    warmup_steps = decay_steps // 10 if scheduler.warmup_steps is None else scheduler.warmup_steps
    scheduler = dataclasses.replace(scheduler, decay_steps=decay_steps, warmup_steps=warmup_steps)
    return dataclasses.replace(config, scheduler=scheduler)


def _with_torchrun_devices(config: TrainConfig) -> TrainConfig:
    if not TorchElasticEnvironment.detect():
        return config
    environment = TorchElasticEnvironment()
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    num_nodes = environment.world_size() // local_size
    trainer = dataclasses.replace(config.trainer, devices=local_size, num_nodes=num_nodes)
    return dataclasses.replace(config, trainer=trainer)


def _accumulation(config: TrainConfig) -> int:
    """Forward passes per optimizer step and device."""
    trainer = config.trainer
    if trainer.global_batch_size is None:
        return trainer.accumulate_grad_batches
    ranks = data_parallel_size(config)
    passes, rest = divmod(trainer.global_batch_size, trainer.batch_size * ranks)
    if rest or not passes:
        raise ConfigError(
            f"trainer.global_batch_size: got {trainer.global_batch_size}, expected a multiple of "
            f"{trainer.batch_size * ranks}: trainer.batch_size={trainer.batch_size} on each of {ranks} data-parallel "
            "devices. Change trainer.batch_size or trainer.global_batch_size."
        )
    return passes


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of matrix products and attention under the config's (resolved) precision."""
    return _COMPUTE_DTYPES[config.trainer.precision]


def describe_device(config: TrainConfig) -> str:
    """The (resolved) device in words."""
    if config.trainer.accelerator == "cuda":
        properties = torch.cuda.get_device_properties(0)
        count = config.trainer.devices * config.trainer.num_nodes
        several = f"{count} x " if count > 1 else ""
        return f"{several}{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
