"""The chunked passes as operators, for torch.compile: what happens inside is not its business."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_ops.cross_entropy.options import SCHEMA, Options
from flash_attn_ops.library import opaque

from . import chunks

_HOW = "bool on_triton, SymInt? chunk_rows, bool accumulate_in_float32"
_WANTED = "bool d_hidden, bool d_weight, bool d_bias"


def _row_fakes(hidden: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))


def _gradient_fakes(
    hidden: Tensor, weight: Tensor, accumulate_in_float32: bool, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    weight_dtype = chunks.result_dtype(weight.dtype, accumulate_in_float32)
    bias_dtype = torch.promote_types(weight.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape) if wanted[0] else None,
        hidden.new_empty(weight.shape, dtype=weight_dtype) if wanted[1] else None,
        hidden.new_empty(weight.shape[0], dtype=bias_dtype) if wanted[2] else None,
    )


@opaque(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? d_loss, "
    f"{_HOW}, {_WANTED}, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, labels, d_loss, on_triton, chunk_rows, in_float32, *rest: (
        *_row_fakes(hidden),
        *_gradient_fakes(hidden, weight, in_float32, rest[:3]),
    ),
)
def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    d_loss: Tensor | None,
    on_triton: bool,
    chunk_rows: int | None,
    accumulate_in_float32: bool,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """``(losses, maximum, log_total, d_hidden, d_weight, d_bias)``; see :func:`.chunks.forward`."""
    return chunks.forward(
        *(hidden, weight, bias, labels, Options(*options), (d_hidden, d_weight, d_bias)),
        d_loss=d_loss,
        on_triton=on_triton,
        chunk_rows=chunk_rows,
        accumulate_in_float32=accumulate_in_float32,
    )


@opaque(
    "linear_cross_entropy_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor maximum, "
    f"Tensor log_total, Tensor d_losses, {_HOW}, {_WANTED}, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, labels, maximum, log_total, d_losses, on_triton, chunk_rows, in_float32, *rest: (
        _gradient_fakes(hidden, weight, in_float32, rest[:3])
    ),
)
def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    d_losses: Tensor,
    on_triton: bool,
    chunk_rows: int | None,
    accumulate_in_float32: bool,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """``(d_hidden, d_weight, d_bias)``; see :func:`.chunks.backward`."""
    return chunks.backward(
        *(hidden, weight, bias, labels, (maximum, log_total), d_losses, Options(*options)),
        (d_hidden, d_weight, d_bias),
        on_triton=on_triton,
        chunk_rows=chunk_rows,
        accumulate_in_float32=accumulate_in_float32,
    )
