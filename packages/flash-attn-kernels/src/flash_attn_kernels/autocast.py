"""Attention under autocast runs in the autocast dtype, as matrix products do.

Inside a path its own precision counts (the portable path multiplies matrices in fp32 for 16-bit inputs), so autocast is
switched off there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast applies to the device of x. The name of a device type is asked last: it costs most."""
    if x.is_cuda:
        return torch.is_autocast_enabled("cuda")
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device_type = x.device.type  # of which some, as meta, know no autocast, and asking them is an error
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_switched_off(x: Tensor) -> torch.autocast:
    """Context without autocast on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def to_autocast_dtype(x: Tensor, device_type: str) -> Tensor:
    """x as autocast would hand it to a matrix product: fp64, integers and tensors elsewhere stay as they are."""
    if (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dtype != torch.float64
        and x.device.type == device_type
    ):
        return x.to(torch.get_autocast_dtype(device_type))
    return x
