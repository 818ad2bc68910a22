"""Triton kernels of LayerNorm and RMSNorm, forward and backward.

Both directions are bound by memory, so each is written to touch every element once:

* ``_forward`` holds whole rows in registers: one read of x (and residual), one write of out (and of their
  sum).
* ``_backward`` is persistent: a program walks rows p, p + programs, ... and keeps its share of dw and db in
  registers; asynchronous copies of the next rows run under the arithmetic of the current one.
  ``_add_partials`` adds the shares in a fixed order, so the same inputs give the same bits.
* Rows too long for registers take the ``_wide`` kernels, which walk the columns in blocks and read their
  input twice.

Row offsets are 64-bit. Sums are float32. Inputs may have any row stride; outputs are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, device_limits, next_power_of_2, on_device_of

MAX_FORWARD_COLS = 32768  # 32 warps with 32 values a thread: what 64 registers hold
MAX_BACKWARD_COLS = 16384  # dw, db, x and d_out of the row share the registers
WIDE_COLS = 4096  # column block of the _wide kernels
WIDE_GRADIENT_ROWS, WIDE_GRADIENT_COLS = (
    32,
    128,
)  # block of the _wide weight gradient: 256 bytes of a row or more


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time, by how many threads, and how many such programs share a
    multiprocessor."""

    rows: int
    cols: int
    num_warps: int
    programs_per_multiprocessor: int = 1


def forward_tile(hidden_size: int) -> Tile:
    """16 values a thread up to 8k columns: two 16-byte loads, and few enough registers for full occupancy."""
    cols = max(16, next_power_of_2(hidden_size))
    if cols <= 2048:  # several rows a program: one short row does not pay for its launch
        return Tile(rows=2048 // cols, cols=cols, num_warps=4)
    if cols <= 8192:
        return Tile(rows=1, cols=cols, num_warps=cols // 512)
    return Tile(rows=1, cols=cols, num_warps=cols // 1024)


def backward_tile(hidden_size: int) -> Tile:
    """As many values a thread as leave room for dw and db, and as many programs as fill the register file."""
    cols = max(16, next_power_of_2(hidden_size))
    if cols <= 2048:
        return Tile(rows=2048 // cols, cols=cols, num_warps=4, programs_per_multiprocessor=4)
    if cols <= 4096:
        return Tile(rows=1, cols=cols, num_warps=8, programs_per_multiprocessor=2)
    return Tile(rows=1, cols=cols, num_warps=cols // 512)


def backward_plan(tile: Tile, bytes_per_column: int, shared_memory_bytes: int) -> tuple[int, int]:
    """``(stages, programs per multiprocessor)`` for loads of so many bytes a column, all tensors together.

    Three stages keep one step's rows in flight while another is computed, in two buffers of shared memory.
    Without room for them, programs that share the multiprocessor hide each other's waiting.
    """
    buffers_bytes = 2 * tile.rows * tile.cols * bytes_per_column
    scratch_bytes = 2 * tile.rows * tile.cols + 1024  # exchanges between threads; what the hardware reserves
    for programs in (tile.programs_per_multiprocessor, 1):
        if programs * (buffers_bytes + scratch_bytes) <= shared_memory_bytes:
            return 3, programs
    return 1, tile.programs_per_multiprocessor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    is_rms: bool,
    sum_dtype: torch.dtype,
    store_sum: bool,
    store_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, sum, mean, rstd)`` of rows x (M, N); ``sum_dtype`` is float32 or the dtype of residual."""
    num_rows, hidden_size = x.shape
    out = x.new_empty(x.shape)
    total = x.new_empty(x.shape, dtype=sum_dtype) if store_sum else None
    rstd = x.new_empty(num_rows, dtype=torch.float32) if store_statistics else None
    mean = x.new_empty(num_rows, dtype=torch.float32) if store_statistics and not is_rms else None
    tile = forward_tile(hidden_size)
    wide = tile.cols > MAX_FORWARD_COLS
    kernel = _forward_wide if wide else _forward
    grid = (num_rows,) if wide else (ceil_div(num_rows, tile.rows),)
    with on_device_of(x):
        kernel[grid](
            x,
            residual,
            weight,
            bias,
            out,
            total,
            mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            num_rows,
            hidden_size,
            eps,
            IS_RMS=is_rms,
            ROUND_SUM=sum_dtype != torch.float32,
            ROWS=1 if wide else tile.rows,
            COLS=WIDE_COLS if wide else tile.cols,
            num_warps=8 if wide else tile.num_warps,
        )
    return out, total, mean, rstd


def backward(
    d_out: Tensor,
    d_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    is_rms: bool,
    x_dtype: torch.dtype,
    second_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``(dx, dx in second_dtype, dw, db)``; x (M, N) is what was normalised, d_sum the gradient of the returned
    sum."""
    num_rows, hidden_size = x.shape
    dx = x.new_empty(x.shape, dtype=x_dtype)
    second = None if second_dtype is None else x.new_empty(x.shape, dtype=second_dtype)
    dw = weight.new_empty(hidden_size)
    db = None if bias_dtype is None else weight.new_empty(hidden_size, dtype=bias_dtype)
    strides = (d_out.stride(0), 0 if d_sum is None else d_sum.stride(0), x.stride(0))
    multiprocessors, shared_memory_bytes = device_limits(x)
    tile = backward_tile(hidden_size)
    with on_device_of(x):
        if tile.cols > MAX_BACKWARD_COLS:
            column_blocks = ceil_div(hidden_size, WIDE_GRADIENT_COLS)
            programs = min(
                ceil_div(num_rows, WIDE_GRADIENT_ROWS), ceil_div(4 * multiprocessors, column_blocks)
            )
            dw_partial, db_partial = _partials(programs, x, bias_dtype)
            _backward_wide[(num_rows,)](
                *(d_out, d_sum, x, weight, mean, rstd, dx, second),
                *strides,
                hidden_size,
                IS_RMS=is_rms,
                COLS=WIDE_COLS,
                num_warps=8,
            )
            _weight_gradient_wide[(column_blocks, programs)](
                *(d_out, x, mean, rstd, dw_partial, db_partial),
                *(d_out.stride(0), x.stride(0)),
                num_rows,
                hidden_size,
                IS_RMS=is_rms,
                ROWS=WIDE_GRADIENT_ROWS,
                COLS=WIDE_GRADIENT_COLS,
                num_warps=4,
            )
        else:
            reads = (d_out, x, weight) if d_sum is None else (d_out, x, weight, d_sum)
            bytes_per_column = sum(tensor.element_size() for tensor in reads)
            stages, sharing = backward_plan(tile, bytes_per_column, shared_memory_bytes)
            programs = min(ceil_div(num_rows, tile.rows), multiprocessors * sharing)
            dw_partial, db_partial = _partials(programs, x, bias_dtype)
            _backward[(programs,)](
                *(d_out, d_sum, x, weight, mean, rstd, dx, second, dw_partial, db_partial),
                *strides,
                num_rows,
                hidden_size,
                IS_RMS=is_rms,
                ROWS=tile.rows,
                COLS=tile.cols,
                STAGES=stages,
                num_warps=tile.num_warps,
            )
        _add_partials[(ceil_div(hidden_size, 32),)](
            dw_partial, db_partial, dw, db, programs, hidden_size, ROWS=64, COLS=32, num_warps=4
        )
    return dx, second, dw, db


def _partials(programs: int, x: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    dw_partial = x.new_empty((programs, x.shape[1]), dtype=torch.float32)
    return dw_partial, None if bias_dtype is None else torch.empty_like(dw_partial)


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x_ptr,
    residual_ptr,  # None: x alone is normalised
    weight_ptr,
    bias_ptr,  # None: no shift
    out_ptr,
    sum_ptr,  # None: not wanted
    mean_ptr,  # None: RMSNorm, or not wanted
    rstd_ptr,  # None: not wanted
    x_row_stride,
    residual_row_stride,
    num_rows,
    hidden_size,
    eps,
    IS_RMS: tl.constexpr,
    ROUND_SUM: tl.constexpr,  # the sum has the residual's dtype, not float32
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    row_mask = row < num_rows
    col_mask = col < hidden_size
    mask = row_mask[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + (row * x_row_stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + (row * residual_row_stride)[:, None] + col[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        if ROUND_SUM:
            x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
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
    out = _scale_shift(x * rstd[:, None], weight_ptr, bias_ptr, col, col_mask)
    tl.store(out_ptr + (row * hidden_size)[:, None] + col[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    d_out_ptr,
    d_sum_ptr,  # None: no gradient comes through the returned sum
    x_ptr,
    weight_ptr,
    mean_ptr,  # None: RMSNorm
    rstd_ptr,
    dx_ptr,
    second_ptr,  # None: dx in its own dtype is enough
    dw_partial_ptr,
    db_partial_ptr,  # None: no bias
    d_out_row_stride,
    d_sum_row_stride,
    x_row_stride,
    num_rows,
    hidden_size,
    IS_RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, COLS)
    col_mask = col < hidden_size
    dw = tl.zeros((ROWS, COLS), tl.float32)
    db = tl.zeros((ROWS, COLS), tl.float32)
    for step in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        # The weight is read again in every step, from cache: keeping it would cost the registers of another
        # row.
        weight = tl.load(weight_ptr + col, mask=col_mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (row * x_row_stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        d_out_ptrs = d_out_ptr + (row * d_out_row_stride)[:, None] + col[None, :]
        d_out = tl.load(d_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        if not IS_RMS:
            x -= tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        x_hat = x * rstd[:, None]
        dw += d_out * x_hat
        if db_partial_ptr is not None:
            db += d_out
        d_hat = d_out * weight[None, :]
        dx = d_hat - x_hat * (tl.sum(d_hat * x_hat, axis=1) / hidden_size)[:, None]
        if not IS_RMS:
            dx -= (tl.sum(d_hat, axis=1) / hidden_size)[:, None]
        dx *= rstd[:, None]
        if d_sum_ptr is not None:
            d_sum_ptrs = d_sum_ptr + (row * d_sum_row_stride)[:, None] + col[None, :]
            dx += tl.load(d_sum_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + (row * hidden_size)[:, None] + col[None, :], dx, mask=mask)
        if second_ptr is not None:
            tl.store(second_ptr + (row * hidden_size)[:, None] + col[None, :], dx, mask=mask)
    partial = program.to(tl.int64) * hidden_size
    tl.store(dw_partial_ptr + partial + col, tl.sum(dw, axis=0), mask=col_mask)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial + col, tl.sum(db, axis=0), mask=col_mask)


@triton.jit(do_not_specialize=["num_partials"])
def _add_partials(
    dw_partial_ptr,
    db_partial_ptr,  # None: no bias
    dw_ptr,
    db_ptr,
    num_partials,
    hidden_size,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    col_mask = col < hidden_size
    dw = tl.zeros((ROWS, COLS), tl.float32)
    db = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_partials, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < num_partials)[:, None] & col_mask[None, :]
        dw += tl.load(dw_partial_ptr + (row * hidden_size)[:, None] + col[None, :], mask=mask, other=0.0)
        if db_partial_ptr is not None:
            db += tl.load(db_partial_ptr + (row * hidden_size)[:, None] + col[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + col, tl.sum(dw, axis=0), mask=col_mask)
    if db_partial_ptr is not None:
        tl.store(db_ptr + col, tl.sum(db, axis=0), mask=col_mask)


@triton.jit
def _scale_shift(x_hat, weight_ptr, bias_ptr, col, col_mask):
    """x_hat * weight + bias, for x_hat (rows, columns). The vectors stay in cache: every row wants them."""
    out = x_hat * tl.load(weight_ptr + col, mask=col_mask, other=0.0, eviction_policy="evict_last").to(
        tl.float32
    )
    if bias_ptr is not None:
        out += tl.load(bias_ptr + col, mask=col_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _forward_wide(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride,
    residual_row_stride,
    num_rows,
    hidden_size,
    eps,
    IS_RMS: tl.constexpr,
    ROUND_SUM: tl.constexpr,  # the sum has the residual's dtype, not float32
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One row a program. Same arguments as ``_forward``; the second walk finds the row in the L2 cache."""
    tl.static_assert(ROWS == 1)
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    squares = 0.0  # sum of squared distances from the mean (of 0 for RMSNorm)
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        mask = col < hidden_size
        x = _load_sum(
            x_ptr + row * x_row_stride, residual_ptr, row * residual_row_stride, col, mask, ROUND_SUM
        )
        if sum_ptr is not None:
            tl.store(sum_ptr + row * hidden_size + col, x, mask=mask)
        if IS_RMS:
            squares += tl.sum(x * x, axis=0)
        else:  # merge the block's mean and squares into the row's [Chan, Golub & LeVeque 1979]
            count = tl.minimum(hidden_size - start, COLS)
            block_mean = tl.sum(x, axis=0) / count
            distance = tl.where(mask, x - block_mean, 0.0)
            shift = block_mean - mean
            merged = start + count
            mean += shift * (count / merged)
            squares += tl.sum(distance * distance, axis=0) + shift * shift * (start * (count / merged))
    rstd = tl.rsqrt(squares / hidden_size + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        mask = col < hidden_size
        x = _load_sum(
            x_ptr + row * x_row_stride, residual_ptr, row * residual_row_stride, col, mask, ROUND_SUM
        )
        out = _scale_shift((x - mean) * rstd, weight_ptr, bias_ptr, col, mask)
        tl.store(out_ptr + row * hidden_size + col, out, mask=mask)


@triton.jit
def _load_sum(x_row_ptr, residual_ptr, residual_offset, col, mask, ROUND_SUM: tl.constexpr):
    x = tl.load(x_row_ptr + col, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_offset + col, mask=mask, other=0.0).to(tl.float32)
        if ROUND_SUM:
            x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _backward_wide(
    d_out_ptr,
    d_sum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    second_ptr,
    d_out_row_stride,
    d_sum_row_stride,
    x_row_stride,
    hidden_size,
    IS_RMS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, one row a program: a walk for the two row sums, a walk that finds the row in the L2 cache for
    dx."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if not IS_RMS:
        mean = tl.load(mean_ptr + row)
    along_x = tl.zeros((COLS,), tl.float32)
    along_ones = tl.zeros((COLS,), tl.float32)
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        mask = col < hidden_size
        x = tl.load(x_ptr + row * x_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + row * d_out_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        d_hat = d_out * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        along_x += d_hat * (x - mean) * rstd
        along_ones += d_hat
    x_share = tl.sum(along_x, axis=0) / hidden_size
    mean_share = 0.0
    if not IS_RMS:
        mean_share = tl.sum(along_ones, axis=0) / hidden_size
    for start in range(0, hidden_size, COLS):
        col = start + tl.arange(0, COLS)
        mask = col < hidden_size
        x = tl.load(x_ptr + row * x_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + row * d_out_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        d_hat = d_out * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        dx = (d_hat - (x - mean) * rstd * x_share - mean_share) * rstd
        if d_sum_ptr is not None:
            dx += tl.load(d_sum_ptr + row * d_sum_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * hidden_size + col, dx, mask=mask)
        if second_ptr is not None:
            tl.store(second_ptr + row * hidden_size + col, dx, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_wide(
    d_out_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dw_partial_ptr,
    db_partial_ptr,
    d_out_row_stride,
    x_row_stride,
    num_rows,
    hidden_size,
    IS_RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One block of columns, every num_programs(1)-th block of rows: a share of dw and db."""
    program = tl.program_id(1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    col_mask = col < hidden_size
    dw = tl.zeros((ROWS, COLS), tl.float32)
    db = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + (row * x_row_stride)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
        d_out_ptrs = d_out_ptr + (row * d_out_row_stride)[:, None] + col[None, :]
        d_out = tl.load(d_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        if not IS_RMS:
            x -= tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        dw += d_out * (x * rstd[:, None])
        if db_partial_ptr is not None:
            db += d_out
    partial = program.to(tl.int64) * hidden_size
    tl.store(dw_partial_ptr + partial + col, tl.sum(dw, axis=0), mask=col_mask)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial + col, tl.sum(db, axis=0), mask=col_mask)
