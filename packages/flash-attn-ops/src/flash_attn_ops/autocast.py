"""What autocast does to the tensors of a matrix product, for the operations that hold one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from flash_attn_kernels.autocast import autocast_is_on
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has products of x computed. None: autocast is off, or leaves x alone, as float64."""
    if x.dtype == torch.float64 or not autocast_is_on(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def as_autocast(tensor: MaybeTensor, dtype: torch.dtype | None) -> MaybeTensor:
    """The tensor as autocast hands it to a product in that dtype; as it is where there is none, and in float64."""
    return tensor if tensor is None or dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def dtype_as_autocast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """That of what :func:`as_autocast` returns."""
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products of tensors where x is have the dtype of what is multiplied. Costs nothing where autocast is off."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()
