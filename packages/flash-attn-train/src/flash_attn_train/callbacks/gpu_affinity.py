"""Each process on the CPU cores next to its GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytorch_lightning as pl
import torch

from flash_attn_train.console import say
from flash_attn_train.errors import ConfigError


class GpuAffinity(pl.Callback):
    """Binds the process, and with it the workers of its loaders, to the cores that NVML says are nearest to its GPU.

    Only cores that the process may use already are taken; if none of them is near, nothing changes. Without a GPU,
    nothing changes either; a line says so.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
            if trainer.is_global_zero:
                say(f"GPU affinity: device is {device.type}, CPU cores are left as they are")
            return
        near = cores_near_gpu(device)
        chosen = set(near) & os.sched_getaffinity(0)
        if chosen:
            os.sched_setaffinity(0, chosen)


def cores_near_gpu(device: torch.device) -> list[int]:
    """Numbers of the CPU cores of the NUMA node of a CUDA device.

    Raises:
        ConfigError: the library for NVML is not installed.
    """
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError as error:
        raise ConfigError(
            "callbacks.gpu_affinity: got true, but nvidia-ml-py is not installed; pip install flash-attn-train[nvml]."
        ) from error
    pynvml.nvmlInit()
    try:
        # By UUID: CUDA_VISIBLE_DEVICES renumbers devices for CUDA and not for NVML.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        num_words = (os.cpu_count() or 1) // 64 + 1
        return cores_of_mask(pynvml.nvmlDeviceGetCpuAffinity(handle, num_words))
    finally:
        pynvml.nvmlShutdown()


def cores_of_mask(words: Sequence[int]) -> list[int]:
    """Positions of the ones in 64-bit words, the lowest bits first."""
    return [64 * index + bit for index, word in enumerate(words) for bit in range(64) if word >> bit & 1]
