"""What the launchers of kernels share."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def ceil_div(numerator: int, denominator: int) -> int:
    return (numerator + denominator - 1) // denominator


def next_power_of_2(size: int) -> int:
    """The smallest power of two >= size."""
    return 1 << max(size - 1, 0).bit_length()


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of the tensor's shape; at half the host time of new_empty."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current, which is where Triton launches. Costs nothing where there is no other GPU."""
    if tensor.is_cuda and not _is_only_gpu() and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING_TO_DO


def device_limits(tensor: Tensor) -> tuple[int, int]:
    """Multiprocessors of the tensor's device, and the bytes of shared memory that one of them gives to
    programs."""
    if (
        not tensor.is_cuda
    ):  # the interpreter: a small device, so that persistent programs walk more than one row
        return 2, 2**16
    return _limits(tensor.get_device())


_NOTHING_TO_DO = nullcontext()


@functools.cache
def _is_only_gpu() -> bool:
    return torch.cuda.device_count() == 1


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor
