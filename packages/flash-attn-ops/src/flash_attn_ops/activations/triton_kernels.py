"""Triton kernels of activations: every element read once and written once, arithmetic in float32.

One kernel a direction, for all activations, with or without a bias in front and a value behind. Tensors are rows; where
nothing depends on the column and all lie dense, they are taken as one row. The backward kernel can also sum its
gradients over rows (programs walk down a strip of columns and leave partial sums, in an order that never changes), and
write the activation again for a product that needs it. Offsets are 64-bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.activations.names import split
from flash_attn_ops.launch import ceil_div, device_limits, empty_like, next_power_of_2
from flash_attn_ops.triton_launch import launch

# Of those that sum over rows: many more than run at a time, so that the last ones end together. Their partial sums are
# 2% of what must move if they have MIN_ROWS.
PROGRAMS_PER_MULTIPROCESSOR = 32
MIN_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program takes at a time, and its warps."""

    rows: int
    cols: int
    num_warps: int


@lru_cache
def elementwise_tile(num_cols: int) -> Tile:
    """16 bytes of bf16 a thread at a time; short rows share a program."""
    cols = min(1024, max(16, next_power_of_2(num_cols)))
    return Tile(1024 // cols, cols, 4)


@lru_cache
def summing_tile(num_cols: int) -> Tile:
    """Strips of 512 bytes of bf16, 16 bytes a thread at a time: few enough registers for four programs at once."""
    cols = min(256, max(16, next_power_of_2(num_cols)))
    return Tile(2048 // cols, cols, 8)


def forward(x: Tensor, bias: Tensor | None, value: Tensor | None, activation: str) -> Tensor:
    """``activation(x + bias) * value`` of rows (M, N) with neighbouring values in a row."""
    out = empty_like(x)
    num_rows, num_cols = _as_one_row(x, value) if bias is None else x.shape
    tile = elementwise_tile(num_cols)
    blocks = ceil_div(num_cols, tile.cols)
    if out.numel() > 0:
        launch(
            _forward,
            (ceil_div(num_rows, tile.rows) * blocks, 1),
            (x, bias, value, out),
            (num_cols, x.stride(0), 0 if value is None else value.stride(0)),
            *((num_rows, blocks), ()),
            (activation, tile.rows, tile.cols),
            tile.num_warps,
        )
    return out


def backward(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    value: Tensor | None,
    activation: str,
    order: str | None,
    bias_dtype: torch.dtype | None,
    with_out: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(d_x, d_value, d_bias, out)`` of rows, as ``operators.backward`` describes them."""
    num_rows, size = x.shape
    packed = order is not None
    d_x = x.new_empty((num_rows, 2 * size if packed else size))
    out = x.new_empty(x.shape) if with_out else None
    d_gate, d_value = d_x, None
    if packed:
        d_gate, d_value = split(d_x, str(order))
    elif value is not None:
        d_value = torch.empty_like(d_x)
    num_cols = size
    if bias_dtype is not None:
        tile = summing_tile(size)
        rows_per_program = _rows_per_program(x, tile)
    else:
        if bias is None:
            num_rows, num_cols = _as_one_row(x, value, d_out, d_gate, d_value)
        tile = elementwise_tile(num_cols)
        rows_per_program = tile.rows
    parts = ceil_div(num_rows, rows_per_program)
    sums, gate_sums, value_sums = None, None, None
    if bias_dtype is not None:
        sums = x.new_empty((parts, d_x.shape[1]), dtype=torch.float32)
        gate_sums, value_sums = split(sums, str(order)) if packed else (sums, None)
    blocks = ceil_div(num_cols, tile.cols)
    if x.numel() > 0:
        value_stride = 0 if value is None else value.stride(0)
        sums_stride = 0 if sums is None else sums.stride(0)
        launch(
            _backward,
            (parts * blocks, 1),
            (d_out, x, bias, value, d_gate, d_value, out, gate_sums, value_sums),
            (num_cols, d_out.stride(0), x.stride(0), value_stride, d_gate.stride(0), sums_stride),
            *((num_rows, rows_per_program, blocks), ()),
            (activation, tile.rows, tile.cols),
            tile.num_warps,
        )
    d_bias = None if sums is None else sums.sum(0).to(bias_dtype)
    return d_x, None if packed else d_value, d_bias, out


def _rows_per_program(x: Tensor, tile: Tile) -> int:
    """How many rows a program sums."""
    multiprocessors, _ = device_limits(x)
    strips = max(1, ceil_div(x.shape[1], tile.cols))
    parts = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // strips)
    return ceil_div(max(MIN_ROWS, ceil_div(x.shape[0], parts)), tile.rows) * tile.rows


def _as_one_row(first: Tensor, *others: Tensor | None) -> tuple[int, int]:
    """Rows and columns, (1, all elements) where that is the same."""
    tensors = (first, *(tensor for tensor in others if tensor is not None))
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, first.numel()
    return first.shape[0], first.shape[1]


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "squared_relu":
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        return tl.sigmoid(x)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        sigmoid = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        near = tl.minimum(tl.maximum(x, -10.0), 10.0)  # beyond, the slope of the sigmoid is 0
        inner = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
        return sigmoid + near * sigmoid * (1.0 - sigmoid) * inner
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "squared_relu":
        return 2.0 * tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        sigmoid = tl.sigmoid(x)
        return sigmoid * (1.0 - sigmoid)


@triton.jit(do_not_specialize=["num_rows", "blocks"])
def _forward(
    x_ptr,
    bias_ptr,  # None: no bias
    value_ptr,  # None: not gated
    out_ptr,
    num_cols,
    x_stride,
    value_stride,
    num_rows,
    blocks,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % blocks).to(tl.int64) * COLS
    col = tl.arange(0, COLS)[None, :]
    in_row = col < num_cols - start
    mask = in_row & (row < num_rows)
    x = tl.load(x_ptr + start + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + start + col, mask=in_row, other=0.0).to(tl.float32)
    out = _activate(x, ACTIVATION)
    if value_ptr is not None:
        out *= tl.load(value_ptr + start + row * value_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + row * num_cols + col, out, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "blocks"])
def _backward(
    d_out_ptr,
    x_ptr,
    bias_ptr,  # None: no bias
    value_ptr,  # None: not gated
    d_x_ptr,
    d_value_ptr,
    out_ptr,  # None: the activation is not wanted
    sums_ptr,  # None: no gradient of a bias
    value_sums_ptr,
    num_cols,
    d_out_stride,
    x_stride,
    value_stride,
    d_x_stride,
    sums_stride,
    num_rows,
    rows_per_program,
    blocks,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    part = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * COLS
    col = tl.arange(0, COLS)[None, :]
    in_row = col < num_cols - start
    sums = tl.zeros((ROWS, COLS), tl.float32)
    value_sums = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, rows_per_program, ROWS):
        row = part * rows_per_program + step + tl.arange(0, ROWS)[:, None]
        mask = in_row & (row < num_rows)
        x = tl.load(x_ptr + start + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + start + row * d_out_stride + col, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + start + col, mask=in_row, other=0.0).to(tl.float32)
        d_x = d_out * _derivative(x, ACTIVATION)
        if value_ptr is not None:
            value = tl.load(value_ptr + start + row * value_stride + col, mask=mask, other=0.0).to(tl.float32)
            out = _activate(x, ACTIVATION)
            d_x *= value
            d_value = d_out * out
            tl.store(d_value_ptr + start + row * d_x_stride + col, d_value, mask=mask)
            if value_sums_ptr is not None:
                value_sums += d_value
            if out_ptr is not None:
                tl.store(out_ptr + start + row * num_cols + col, out * value, mask=mask)
        elif out_ptr is not None:
            tl.store(out_ptr + start + row * num_cols + col, _activate(x, ACTIVATION), mask=mask)
        tl.store(d_x_ptr + start + row * d_x_stride + col, d_x, mask=mask)
        if sums_ptr is not None:
            sums += d_x
    sums_col = start + part * sums_stride + tl.arange(0, COLS)
    in_row_1d = tl.arange(0, COLS) < num_cols - start
    if sums_ptr is not None:
        tl.store(sums_ptr + sums_col, tl.sum(sums, axis=0), mask=in_row_1d)
    if value_sums_ptr is not None:
        tl.store(value_sums_ptr + sums_col, tl.sum(value_sums, axis=0), mask=in_row_1d)
