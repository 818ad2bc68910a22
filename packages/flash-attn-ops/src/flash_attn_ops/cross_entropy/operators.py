"""The launchers of the cross-entropy kernels as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_ops.library import opaque

_OPTIONS = "float label_smoothing, float logit_scale, float z_loss, SymInt ignore_index"


def _losses_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    num_rows = logits.shape[0]
    return tuple(logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


@opaque(f"cross_entropy_forward(Tensor logits, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor)", _losses_fake)
def losses(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``(losses, lse)``, float32 (M,), of logits (M, V)."""
    from . import triton_kernels

    return triton_kernels.losses(logits, labels, label_smoothing, logit_scale, z_loss, ignore_index)


@opaque(
    "cross_entropy_backward(Tensor logits, Tensor labels, Tensor lse, Tensor d_loss, Tensor? divisor, "
    f"{_OPTIONS}) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape),
)
def d_logits(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    d_loss: Tensor,
    divisor: Tensor | None,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    ignore_index: int,
) -> Tensor:
    """The gradient (M, V), in new memory."""
    from . import triton_kernels

    options = (label_smoothing, logit_scale, z_loss, ignore_index)
    return triton_kernels.d_logits(logits, labels, lse, d_loss, divisor, *options, inplace=False)
