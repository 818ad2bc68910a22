"""Backward kernels of LayerNorm and RMSNorm. With x_hat the normalised row and d_hat = d_out * weight (plus
d_out1 * weight1), the gradient of the sum that was normalised is

    g = rstd * (d_hat - x_hat * mean(d_hat * x_hat) - [LayerNorm] mean(d_hat)) + d_sum

which is the gradient of the residual; through its mask and scales it becomes dx, and dx1. The gradients of vectors
are sums over rows: each program adds up its own, in registers, and ``_add_partials`` adds those in a fixed order, so
that the same inputs give the same bits.

* ``_backward`` is persistent: a program walks rows p, p + programs, ... and touches every element once. Of few rows
  one program takes all, and writes the gradients of vectors itself.
* Rows too long for that take two kernels: ``_row_means`` finds the two means, ``_backward_columns`` does the rest
  block by block of columns; together they read their inputs twice.

Pointers that are None stand for what the call does without. Row offsets are 64-bit. Inputs may have any row stride;
what is written is contiguous.
"""

# Device code: its arguments are Triton's.
# mypy: disallow-incomplete-defs=False
# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import keep_block


@triton.jit
def _load_weight(weight_ptr, col, col_mask, ZERO_CENTERED: tl.constexpr):
    weight = tl.load(weight_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
    return (weight + 1.0 if ZERO_CENTERED else weight)[None, :]


@triton.jit
def _load_rows(pointer, row, row_stride, col, row_mask, col_mask, EVICTION: tl.constexpr):
    pointers = pointer + (row * row_stride)[:, None] + col[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def _load_gradients(
    d_out_ptr,
    d_out1_ptr,
    total_ptr,
    weight_ptr,
    weight1_ptr,
    d_out_row_stride,
    d_out1_row_stride,
    total_row_stride,
    row,
    col,
    row_mask,
    col_mask,
    mean,
    rstd,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """``(x_hat, d_out, d_out1, d_hat)`` of rows and columns; d_out1 is d_out where there is none."""
    weight = _load_weight(weight_ptr, col, col_mask, ZERO_CENTERED)
    x_hat = _load_rows(total_ptr, row, total_row_stride, col, row_mask, col_mask, EVICTION)
    d_out = _load_rows(d_out_ptr, row, d_out_row_stride, col, row_mask, col_mask, EVICTION)
    if not IS_RMS:
        x_hat -= mean[:, None]
    x_hat *= rstd[:, None]
    d_out1 = d_out
    d_hat = d_out * weight
    if d_out1_ptr is not None:
        d_out1 = _load_rows(d_out1_ptr, row, d_out1_row_stride, col, row_mask, col_mask, EVICTION)
        d_hat += d_out1 * _load_weight(weight1_ptr, col, col_mask, ZERO_CENTERED)
    return x_hat, d_out, d_out1, d_hat


@triton.jit
def _store_gradients(
    g,
    d_sum_ptr,
    x_ptr,
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,
    dx_ptr,
    dx1_ptr,
    d_residual_ptr,
    d_sum_row_stride,
    x_row_stride,
    row,
    first_col,
    row_mask,
    col_mask,
    hidden_size,
    threshold,
    keep_scale,
    COLS: tl.constexpr,
):
    """Adds d_sum to g, and writes what follows from it. Returns these rows' shares of the layerscale's gradient."""
    col = first_col + tl.arange(0, COLS)
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = (row * hidden_size)[:, None] + col[None, :]
    if d_sum_ptr is not None:
        g += _load_rows(d_sum_ptr, row, d_sum_row_stride, col, row_mask, col_mask, "")
    if d_residual_ptr is not None:
        tl.store(d_residual_ptr + offsets, g, mask=mask)
    if dx1_ptr is not None:
        dx1 = g
        if seed_ptr is not None:
            seed, offset = tl.load(seed_ptr), tl.load(seed_ptr + 1)
            keep = keep_block(seed, offset, row, first_col, threshold, 1, COLS)
            dx1 = tl.where(keep, g * keep_scale, 0.0)
        tl.store(dx1_ptr + offsets, dx1, mask=mask)
    dx = g
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(seed_ptr + 1)
        dx = tl.where(keep_block(seed, offset, row, first_col, threshold, 0, COLS), g * keep_scale, 0.0)
    if rowscale_ptr is not None:
        dx *= tl.load(rowscale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    d_layerscale = dx
    if x_ptr is not None:
        d_layerscale *= _load_rows(x_ptr, row, x_row_stride, col, row_mask, col_mask, "")
    if layerscale_ptr is not None:
        dx *= tl.load(layerscale_ptr + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(dx_ptr + offsets, dx, mask=mask)
    return d_layerscale


@triton.jit
def _store_partials(
    dw,
    db,
    dw1,
    db1,
    d_layerscale,
    partial_ptr,
    program,
    programs,
    hidden_size,
    col,
    col_mask,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT1: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_LAYERSCALE: tl.constexpr,
):
    """partial (accumulators, programs, N): the accumulators there are, in this order."""
    pointers = partial_ptr + program.to(tl.int64) * hidden_size + col
    step = programs.to(tl.int64) * hidden_size
    tl.store(pointers, tl.sum(dw, axis=0), mask=col_mask)
    if HAS_BIAS:
        pointers += step
        tl.store(pointers, tl.sum(db, axis=0), mask=col_mask)
    if HAS_WEIGHT1:
        pointers += step
        tl.store(pointers, tl.sum(dw1, axis=0), mask=col_mask)
    if HAS_BIAS1:
        pointers += step
        tl.store(pointers, tl.sum(db1, axis=0), mask=col_mask)
    if HAS_LAYERSCALE:
        pointers += step
        tl.store(pointers, tl.sum(d_layerscale, axis=0), mask=col_mask)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _backward(
    d_out_ptr,
    d_out1_ptr,
    d_sum_ptr,
    total_ptr,
    x_ptr,  # for the gradient of layerscale
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,
    weight_ptr,
    weight1_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dx1_ptr,
    d_residual_ptr,
    partial_ptr,  # None: one program does all rows, and writes the gradients of the vectors itself
    dw_ptr,
    db_ptr,
    d_out_row_stride,
    d_out1_row_stride,
    d_sum_row_stride,
    total_row_stride,
    x_row_stride,
    hidden_size,
    num_rows,
    threshold,
    keep_scale,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One block of sums for each part of the row.
    dw = ()
    db = ()
    dw1 = ()
    db1 = ()
    d_layerscale = ()
    for _ in tl.static_range(PARTS):
        dw += (tl.zeros((ROWS, COLS), tl.float32),)
        db += (tl.zeros((ROWS, COLS), tl.float32),)
        dw1 += (tl.zeros((ROWS, COLS), tl.float32),)
        db1 += (tl.zeros((ROWS, COLS), tl.float32),)
        d_layerscale += (tl.zeros((ROWS, COLS), tl.float32),)
    # One part: what is loaded first serves to the end. Several: it stays in cache for the second walk, and is done
    # with there. The weight is read again in every step, from cache: keeping it would cost the registers of a row.
    FIRST_EVICTION: tl.constexpr = "" if PARTS == 1 else "evict_last"
    for step in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < num_rows
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        mean = rstd
        if not IS_RMS:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        along_x = tl.zeros((ROWS, COLS), tl.float32)
        along_ones = tl.zeros((ROWS, COLS), tl.float32)
        for part in tl.static_range(PARTS):
            col = part * COLS + tl.arange(0, COLS)
            col_mask = col < hidden_size
            x_hat, d_out, d_out1, d_hat = _load_gradients(
                *(d_out_ptr, d_out1_ptr, total_ptr, weight_ptr, weight1_ptr),
                *(d_out_row_stride, d_out1_row_stride, total_row_stride),
                *(row, col, row_mask, col_mask, mean, rstd, IS_RMS, ZERO_CENTERED, FIRST_EVICTION),
            )
            if part == 0:
                along_x = d_hat * x_hat
                along_ones = d_hat
            else:
                along_x += d_hat * x_hat
                along_ones += d_hat
        x_share = (tl.sum(along_x, axis=1) / hidden_size)[:, None]
        ones_share = x_share
        if not IS_RMS:
            ones_share = (tl.sum(along_ones, axis=1) / hidden_size)[:, None]
        next_dw = ()
        next_db = ()
        next_dw1 = ()
        next_db1 = ()
        next_d_layerscale = ()
        for part in tl.static_range(PARTS):
            col = part * COLS + tl.arange(0, COLS)
            col_mask = col < hidden_size
            if PARTS > 1:
                x_hat, d_out, d_out1, d_hat = _load_gradients(
                    *(d_out_ptr, d_out1_ptr, total_ptr, weight_ptr, weight1_ptr),
                    *(d_out_row_stride, d_out1_row_stride, total_row_stride),
                    *(row, col, row_mask, col_mask, mean, rstd, IS_RMS, ZERO_CENTERED, "evict_first"),
                )
            next_dw += (dw[part] + d_out * x_hat,)
            next_db += (db[part] + d_out if HAS_BIAS else db[part],)
            next_dw1 += (dw1[part] if d_out1_ptr is None else dw1[part] + d_out1 * x_hat,)
            next_db1 += (db1[part] + d_out1 if HAS_BIAS1 else db1[part],)
            g = d_hat - x_hat * x_share
            if not IS_RMS:
                g -= ones_share
            share = _store_gradients(
                *(g * rstd[:, None], d_sum_ptr, x_ptr, rowscale_ptr, layerscale_ptr, seed_ptr),
                *(dx_ptr, dx1_ptr, d_residual_ptr, d_sum_row_stride, x_row_stride),
                *(row, part * COLS, row_mask, col_mask, hidden_size, threshold, keep_scale, COLS),
            )
            next_d_layerscale += (d_layerscale[part] if x_ptr is None else d_layerscale[part] + share,)
        dw = next_dw
        db = next_db
        dw1 = next_dw1
        db1 = next_db1
        d_layerscale = next_d_layerscale
    for part in tl.static_range(PARTS):
        col = part * COLS + tl.arange(0, COLS)
        if partial_ptr is None:
            tl.store(dw_ptr + col, tl.sum(dw[part], axis=0), mask=col < hidden_size)
            if HAS_BIAS:
                tl.store(db_ptr + col, tl.sum(db[part], axis=0), mask=col < hidden_size)
        else:
            _store_partials(
                *(dw[part], db[part], dw1[part], db1[part], d_layerscale[part], partial_ptr),
                *(tl.program_id(0), tl.num_programs(0), hidden_size, col, col < hidden_size),
                *(HAS_BIAS, d_out1_ptr is not None, HAS_BIAS1, x_ptr is not None),
            )


@triton.jit
def _row_means(
    d_out_ptr,
    d_out1_ptr,
    total_ptr,
    weight_ptr,
    weight1_ptr,
    mean_ptr,
    rstd_ptr,
    x_share_ptr,
    ones_share_ptr,  # there with mean
    d_out_row_stride,
    d_out1_row_stride,
    total_row_stride,
    hidden_size,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    COLS: tl.constexpr,
):
    """mean(d_hat * x_hat) and mean(d_hat), one row a program."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    mean = rstd
    if not IS_RMS:
        mean = tl.load(mean_ptr + row)
    along_x = tl.zeros((1, COLS), tl.float32)
    along_ones = tl.zeros((1, COLS), tl.float32)
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        x_hat, _, _, d_hat = _load_gradients(
            *(d_out_ptr, d_out1_ptr, total_ptr, weight_ptr, weight1_ptr),
            *(d_out_row_stride, d_out1_row_stride, total_row_stride),
            *(row, col, row >= 0, col < hidden_size, mean, rstd, IS_RMS, ZERO_CENTERED, ""),
        )
        along_x += d_hat * x_hat
        along_ones += d_hat
    tl.store(x_share_ptr + row, tl.sum(along_x, axis=1) / hidden_size)
    if not IS_RMS:
        tl.store(ones_share_ptr + row, tl.sum(along_ones, axis=1) / hidden_size)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _backward_columns(
    d_out_ptr,
    d_out1_ptr,
    d_sum_ptr,
    total_ptr,
    x_ptr,
    rowscale_ptr,
    layerscale_ptr,
    seed_ptr,
    weight_ptr,
    weight1_ptr,
    mean_ptr,
    rstd_ptr,
    x_share_ptr,
    ones_share_ptr,
    dx_ptr,
    dx1_ptr,
    d_residual_ptr,
    partial_ptr,
    d_out_row_stride,
    d_out1_row_stride,
    d_sum_row_stride,
    total_row_stride,
    x_row_stride,
    hidden_size,
    num_rows,
    threshold,
    keep_scale,
    IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of columns, every num_programs(1)-th block of rows."""
    first_col = tl.program_id(0) * COLS
    col = first_col + tl.arange(0, COLS)
    col_mask = col < hidden_size
    dw = tl.zeros((ROWS, COLS), tl.float32)
    db = tl.zeros((ROWS, COLS), tl.float32)
    dw1 = tl.zeros((ROWS, COLS), tl.float32)
    db1 = tl.zeros((ROWS, COLS), tl.float32)
    d_layerscale = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < num_rows
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        mean = rstd
        if not IS_RMS:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        x_hat, d_out, d_out1, d_hat = _load_gradients(
            *(d_out_ptr, d_out1_ptr, total_ptr, weight_ptr, weight1_ptr),
            *(d_out_row_stride, d_out1_row_stride, total_row_stride),
            *(row, col, row_mask, col_mask, mean, rstd, IS_RMS, ZERO_CENTERED, ""),
        )
        dw += d_out * x_hat
        if HAS_BIAS:
            db += d_out
        if d_out1_ptr is not None:
            dw1 += d_out1 * x_hat
        if HAS_BIAS1:
            db1 += d_out1
        g = d_hat - x_hat * tl.load(x_share_ptr + row, mask=row_mask, other=0.0)[:, None]
        if not IS_RMS:
            g -= tl.load(ones_share_ptr + row, mask=row_mask, other=0.0)[:, None]
        share = _store_gradients(
            *(g * rstd[:, None], d_sum_ptr, x_ptr, rowscale_ptr, layerscale_ptr, seed_ptr),
            *(dx_ptr, dx1_ptr, d_residual_ptr, d_sum_row_stride, x_row_stride),
            *(row, first_col, row_mask, col_mask, hidden_size, threshold, keep_scale, COLS),
        )
        if x_ptr is not None:
            d_layerscale += share
    _store_partials(
        *(dw, db, dw1, db1, d_layerscale, partial_ptr),
        *(tl.program_id(1), tl.num_programs(1), hidden_size, col, col_mask),
        *(HAS_BIAS, d_out1_ptr is not None, HAS_BIAS1, x_ptr is not None),
    )


@triton.jit(do_not_specialize=["num_partials"])
def _add_partials(
    partial_ptr,
    dw_ptr,
    db_ptr,
    dw1_ptr,
    db1_ptr,
    d_layerscale_ptr,
    hidden_size,
    num_partials,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of columns of one accumulator: the sum over programs, to the vector that it is the gradient of."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    col_mask = col < hidden_size
    accumulator = tl.program_id(1)
    partial_ptr += accumulator.to(tl.int64) * num_partials * hidden_size
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_partials, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < num_partials)[:, None] & col_mask[None, :]
        total += tl.load(partial_ptr + (row * hidden_size)[:, None] + col[None, :], mask=mask, other=0.0)
    vector = tl.sum(total, axis=0)
    position = 0  # among the accumulators there are
    if accumulator == position:
        tl.store(dw_ptr + col, vector, mask=col_mask)
    if db_ptr is not None:
        position += 1
        if accumulator == position:
            tl.store(db_ptr + col, vector, mask=col_mask)
    if dw1_ptr is not None:
        position += 1
        if accumulator == position:
            tl.store(dw1_ptr + col, vector, mask=col_mask)
    if db1_ptr is not None:
        position += 1
        if accumulator == position:
            tl.store(db1_ptr + col, vector, mask=col_mask)
    if d_layerscale_ptr is not None:
        position += 1
        if accumulator == position:
            tl.store(d_layerscale_ptr + col, vector, mask=col_mask)
