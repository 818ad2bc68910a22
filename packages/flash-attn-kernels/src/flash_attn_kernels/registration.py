"""Registering operators of this package that are written in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("flash_attn_kernels", "FRAGMENT")


def register_operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``torch.ops.flash_attn_kernels.<name>`` on every device, without a gradient.

    Args:
        schema: arguments and results, as ``(Tensor x, int n) -> Tensor``.
        function: computes the results.
        fake: makes tensors of their shapes, dtypes and strides.

    Returns:
        The operator, to be called.
    """
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.flash_attn_kernels, name).default
