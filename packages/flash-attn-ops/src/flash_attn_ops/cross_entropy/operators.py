"""The launchers of the cross-entropy kernels as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.library import kernels_of, opaque

from .options import SCHEMA, Options

_kernels = kernels_of(__package__)


def _per_row(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(count))


@opaque(
    f"cross_entropy_forward(Tensor logits, Tensor labels, Tensor? lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    lambda logits, labels, lse, *_: (
        _per_row(logits, 3) if lse is None else (*_per_row(logits, 1), None, None)
    ),
)
def losses(
    logits: Tensor, labels: Tensor, lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(losses, maximum, log_total)``, float32 (M,), of logits (M, V); only the first if lse is given."""
    return _kernels().losses(logits, labels, lse, Options(*options))


@opaque(
    f"cross_entropy_statistics(Tensor logits, Tensor labels, Tensor? lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    lambda logits, *_: _per_row(logits, 3),
)
def statistics(
    logits: Tensor, labels: Tensor, lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``(maximum, total, target)``, float32 (M,), of logits (M, V); only the last has a meaning if lse is given."""
    return _kernels().statistics(logits, labels, lse, Options(*options))


@opaque(
    "cross_entropy_backward(Tensor logits, Tensor labels, Tensor maximum, Tensor log_total, Tensor d_loss, "
    "Tensor? divisor, "
    f"{SCHEMA}) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape),
)
def d_logits(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    d_loss: Tensor,
    divisor: Tensor | None,
    *options: Any,
) -> Tensor:
    """The gradient (M, V), in new memory."""
    row = (labels, maximum, log_total, d_loss, divisor)
    return _kernels().d_logits(logits, *row, Options(*options), inplace=False)


@opaque(
    "cross_entropy_mean(Tensor losses, Tensor labels, SymInt ignore_index) -> (Tensor, Tensor)",
    lambda losses, *_: (losses.new_empty(()), losses.new_empty((), dtype=torch.int64)),
)
def mean(losses: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``(mean, count)`` over the rows that are not ignored."""
    return _kernels().mean(losses, labels, ignore_index)
