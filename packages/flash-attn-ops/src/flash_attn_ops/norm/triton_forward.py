"""Forward kernels of LayerNorm and RMSNorm: the sum, its statistics, one output or two.

Pointers that are None stand for what the call does without. Row offsets are 64-bit, sums float32. Inputs may have
any row stride; what is written is contiguous.
"""

# Device code: its arguments are Triton's.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import keep_block


@triton.jit
def _load_rows(pointer, row, row_stride, col, mask):
    return tl.load(pointer + (row * row_stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(
    x_ptr,
    x1_ptr,
    residual_ptr,
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,
    x_row_stride,
    x1_row_stride,
    residual_row_stride,
    row,
    first_col,
    row_mask,
    col_mask,
    threshold,
    keep_scale,
    ROUNDED_TO: tl.constexpr,
    COLS: tl.constexpr,
):
    """dropout(x * rowscale * layerscale) + dropout(x1) + residual, float32 with the rounding of the stored sum."""
    col = first_col + tl.arange(0, COLS)
    mask = row_mask[:, None] & col_mask[None, :]
    x = _load_rows(x_ptr, row, x_row_stride, col, mask)
    if rowscale_ptr is not None:
        x *= tl.load(rowscale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if layerscale_ptr is not None:
        x *= tl.load(layerscale_ptr + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(seed_ptr + 1)
        x = tl.where(keep_block(seed, offset, row, first_col, threshold, 0, COLS), x * keep_scale, 0.0)
    if x1_ptr is not None:
        x1 = _load_rows(x1_ptr, row, x1_row_stride, col, mask)
        if seed_ptr is not None:
            x1 = tl.where(keep_block(seed, offset, row, first_col, threshold, 1, COLS), x1 * keep_scale, 0.0)
        x += x1
    if residual_ptr is not None:
        x += _load_rows(residual_ptr, row, residual_row_stride, col, mask)
    return x.to(ROUNDED_TO).to(tl.float32)


@triton.jit
def _scale_shift(x_hat, weight_ptr, bias_ptr, col, col_mask, ZERO_CENTERED: tl.constexpr):
    """x_hat * weight + bias, for x_hat (rows, columns). The vectors stay in cache: every row wants them."""
    weight = tl.load(weight_ptr + col, mask=col_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    out = x_hat * (weight + 1.0 if ZERO_CENTERED else weight)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col_mask, other=0.0, eviction_policy="evict_last")
        out += bias.to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _forward(
    x_ptr,
    x1_ptr,
    residual_ptr,
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,  # None: no dropout
    weight_ptr,
    bias_ptr,
    weight1_ptr,
    bias1_ptr,
    out_ptr,
    out1_ptr,  # there with weight1
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride,
    x1_row_stride,
    residual_row_stride,
    hidden_size,
    num_rows,
    threshold,  # 32 bits, whatever the sign
    eps,
    keep_scale,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROUNDED_TO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Whole rows in registers: one read of every input, one write of every result."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    row_mask = row < num_rows
    col_mask = col < hidden_size
    mask = row_mask[:, None] & col_mask[None, :]
    x = _load_sum(
        *(x_ptr, x1_ptr, residual_ptr, rowscale_ptr, layerscale_ptr, seed_ptr),
        *(x_row_stride, x1_row_stride, residual_row_stride, row, 0, row_mask, col_mask),
        *(threshold, keep_scale, ROUNDED_TO, COLS),
    )
    if sum_ptr is not None:
        tl.store(sum_ptr + (row * hidden_size)[:, None] + col[None, :], x, mask=mask)
    if not IS_RMS:
        mean = tl.sum(x, axis=1) / hidden_size
        x = tl.where(mask, x - mean[:, None], 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=row_mask)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / hidden_size + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row_mask)
    x_hat = x * rstd[:, None]
    out = _scale_shift(x_hat, weight_ptr, bias_ptr, col, col_mask, ZERO_CENTERED)
    tl.store(out_ptr + (row * hidden_size)[:, None] + col[None, :], out, mask=mask)
    if weight1_ptr is not None:
        out1 = _scale_shift(x_hat, weight1_ptr, bias1_ptr, col, col_mask, ZERO_CENTERED)
        tl.store(out1_ptr + (row * hidden_size)[:, None] + col[None, :], out1, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _forward_wide(
    x_ptr,
    x1_ptr,
    residual_ptr,
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    weight1_ptr,
    bias1_ptr,
    out_ptr,
    out1_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride,
    x1_row_stride,
    residual_row_stride,
    hidden_size,
    num_rows,
    threshold,
    eps,
    keep_scale,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROUNDED_TO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One row a program. Same arguments as ``_forward``; the second walk finds the row in the L2 cache."""
    tl.static_assert(ROWS == 1)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_mask = row < num_rows
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)  # sum of squared distances from the mean (of 0 for RMSNorm)
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        col_mask = col < hidden_size
        x = _load_sum(
            *(x_ptr, x1_ptr, residual_ptr, rowscale_ptr, layerscale_ptr, seed_ptr),
            *(x_row_stride, x1_row_stride, residual_row_stride, row, start, row_mask, col_mask),
            *(threshold, keep_scale, ROUNDED_TO, COLS),
        )
        if sum_ptr is not None:
            sum_ptrs = sum_ptr + (row * hidden_size)[:, None] + col[None, :]
            tl.store(sum_ptrs, x, mask=col_mask[None, :])
        if IS_RMS:
            squares += tl.sum(x * x, axis=1)
        else:  # merge the block's mean and squares into the row's [Chan, Golub & LeVeque 1979]
            count = tl.minimum(hidden_size - start, COLS)
            block_mean = tl.sum(x, axis=1) / count
            distance = tl.where(col_mask[None, :], x - block_mean[:, None], 0.0)
            shift = block_mean - mean
            merged = start + count
            mean += shift * (count / merged)
            squares += tl.sum(distance * distance, axis=1) + shift * shift * (start * (count / merged))
    rstd = tl.rsqrt(squares / hidden_size + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    if sum_ptr is not None:
        tl.debug_barrier()  # the second walk may read what another thread of this program has written
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        col_mask = col < hidden_size
        if sum_ptr is not None:  # which may have overwritten the residual
            x = _load_rows(sum_ptr, row, hidden_size, col, col_mask[None, :])
        else:
            x = _load_sum(
                *(x_ptr, x1_ptr, residual_ptr, rowscale_ptr, layerscale_ptr, seed_ptr),
                *(x_row_stride, x1_row_stride, residual_row_stride, row, start, row_mask, col_mask),
                *(threshold, keep_scale, ROUNDED_TO, COLS),
            )
        x_hat = (x - mean[:, None]) * rstd[:, None]
        out = _scale_shift(x_hat, weight_ptr, bias_ptr, col, col_mask, ZERO_CENTERED)
        tl.store(out_ptr + (row * hidden_size)[:, None] + col[None, :], out, mask=col_mask[None, :])
        if weight1_ptr is not None:
            out1 = _scale_shift(x_hat, weight1_ptr, bias1_ptr, col, col_mask, ZERO_CENTERED)
            tl.store(out1_ptr + (row * hidden_size)[:, None] + col[None, :], out1, mask=col_mask[None, :])
