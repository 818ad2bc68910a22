"""Launchers of the norm kernels: tiles chosen, memory allocated, kernels started."""

from __future__ import annotations

from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, device_limits
from flash_attn_ops.triton_launch import launch

from . import tiles, triton_backward, triton_dropout, triton_forward
from .dropout import drop_threshold, keep_scale

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def forward(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    out: Tensor,
    out1: Tensor | None,
    total: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
    sum_dtype: torch.dtype,
    store_statistics: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes out, out1 and the sum of x (..., N), of any strides; returns ``(mean, rstd)``, one value a row."""
    hidden_size = x.shape[-1]
    num_rows = x.numel() // hidden_size
    mean = rstd = None
    if store_statistics:
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        mean = None if is_rms else torch.empty_like(rstd)
    changed = not (
        x1 is None and residual is None and rowscale is None and layerscale is None and seed is None
    )
    tile = tiles.forward_tile(hidden_size)
    kernel = triton_forward._forward if tile else triton_forward._forward_wide
    tile = tile or tiles.ForwardTile(rows=1, cols=tiles.WIDE_COLS, num_warps=8)
    x, x_stride = rows_of(x)
    x1, x1_stride = rows_of(x1)
    residual, residual_stride = rows_of(residual)
    launch(
        kernel,
        (ceil_div(num_rows, tile.rows), 1),
        (
            *(x, x1, residual, rowscale, layerscale, seed, weight, bias, weight1, bias1),
            *(out, out1, total, mean, rstd),
        ),
        (x_stride, x1_stride, residual_stride, hidden_size),
        (num_rows, _threshold(dropout_p)),
        (eps, keep_scale(dropout_p)),
        (
            *(is_rms, zero_centered, _TRITON_DTYPES[sum_dtype if changed else torch.float32]),
            *(tile.rows, tile.cols),
        ),
        tile.num_warps,
    )
    return mean, rstd


def backward(
    d_out: Tensor,
    d_out1: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    weight1: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dx1: Tensor | None,
    d_residual: Tensor | None,
    vectors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    is_rms: bool,
    zero_centered: bool,
) -> None:
    """Writes dx, dx1, d_residual, and into ``vectors`` the gradients of weight, bias, weight1, bias1, layerscale."""
    hidden_size = total.shape[-1]
    num_rows = total.numel() // hidden_size
    has_bias, has_bias1 = vectors[1] is not None, vectors[3] is not None
    only_weight_and_bias = vectors[2] is None and not has_bias1 and vectors[4] is None
    accumulators = 1 + has_bias + (vectors[2] is not None) + has_bias1 + (vectors[4] is not None)
    multiprocessors, shared_memory_bytes = device_limits(total)
    few_rows_tile = None
    if only_weight_and_bias:
        few_rows_tile = tiles.backward_tile_of_few_rows(num_rows, hidden_size, accumulators)
    tile = few_rows_tile or tiles.backward_tile(hidden_size, accumulators)
    d_out, d_out_stride = rows_of(d_out)
    d_out1, d_out1_stride = rows_of(d_out1)
    d_sum, d_sum_stride = rows_of(d_sum)
    total, total_stride = rows_of(total)
    x, x_stride = rows_of(x)
    tensors = (d_out, d_out1, d_sum, total, x, rowscale, layerscale, seed, weight, weight1, mean, rstd)
    sizes = (d_out_stride, d_out1_stride, d_sum_stride, total_stride, x_stride, hidden_size)
    counts, numbers = (num_rows, _threshold(dropout_p)), (keep_scale(dropout_p),)
    options = (is_rms, zero_centered, has_bias, has_bias1)
    if tile:
        bytes_per_column = 0
        for tensor in (d_out, d_out1, d_sum, total, x, weight, weight1, layerscale):
            bytes_per_column += 0 if tensor is None else tensor.itemsize
        stages, sharing = tiles.backward_plan(tile, bytes_per_column, shared_memory_bytes)
        written: tuple[Tensor | None, Tensor | None] = vectors[:2]
        programs, partial = 1, None
        if few_rows_tile is None:
            programs = min(ceil_div(num_rows, tile.rows), multiprocessors * sharing)
            partial, written = rstd.new_empty((accumulators, programs, hidden_size)), (None, None)
        launch(
            triton_backward._backward,
            (programs, 1),
            (*tensors, dx, dx1, d_residual, partial, *written),
            *(sizes, counts, numbers),
            (*options, tile.rows, tile.cols, tile.parts, stages),
            tile.num_warps,
        )
        if few_rows_tile is not None:
            return
    else:
        rows, cols = tiles.wide_gradient_rows(accumulators), tiles.WIDE_GRADIENT_COLS
        column_blocks = ceil_div(hidden_size, cols)
        programs = min(ceil_div(num_rows, rows), ceil_div(4 * multiprocessors, column_blocks))
        partial = rstd.new_empty((accumulators, programs, hidden_size))
        x_share = rstd.new_empty(num_rows)
        ones_share = None if is_rms else rstd.new_empty(num_rows)
        launch(
            triton_backward._row_means,
            (num_rows, 1),
            (d_out, d_out1, total, weight, weight1, mean, rstd, x_share, ones_share),
            (d_out_stride, d_out1_stride, total_stride, hidden_size),
            *((), ()),
            (is_rms, zero_centered, tiles.WIDE_COLS),
            8,
        )
        launch(
            triton_backward._backward_columns,
            (column_blocks, programs),
            (*tensors, x_share, ones_share, dx, dx1, d_residual, partial),
            *(sizes, counts, numbers),
            (*options, rows, cols),
            4,
        )
    launch(
        triton_backward._add_partials,
        (ceil_div(hidden_size, 32), accumulators),
        (partial, *vectors),
        (hidden_size,),
        (programs,),
        (),
        (64, 32),
        4,
    )


def dropout_mask(seed: Tensor, mask: Tensor, dropout_p: float, branch: int) -> None:
    """Writes mask (..., N), bool: True where the element stays."""
    hidden_size = mask.shape[-1]
    num_rows = mask.numel() // hidden_size
    launch(
        triton_dropout._mask,
        (ceil_div(num_rows, 4), 1),
        (seed, mask),
        (hidden_size,),
        (num_rows, _threshold(dropout_p)),
        (),
        (branch, 4, 512),
        4,
    )


def rows_of(tensor: MaybeTensor) -> tuple[MaybeTensor, int]:
    """(..., N) with neighbouring values in a row, and the distance of its rows; a view unless the strides forbid it."""
    if tensor is None:
        return tensor, 0
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _threshold(dropout_p: float) -> int:
    """The bits of the threshold as an int32, so that every one is compiled for alike."""
    threshold = drop_threshold(dropout_p) if dropout_p else 0
    return threshold - 2**32 if threshold >= 2**31 else threshold
