"""The gradient of a bias as a Triton kernel: sums over tokens in float32, in an order that never changes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, device_limits, next_power_of_2
from flash_attn_ops.triton_launch import launch

ELEMENTS = 4096  # of a step of a program: 32 bytes of bf16 for each of its threads
MAX_COLS = 256
NUM_WARPS = 8
# As many as run at a time, twice. Their partial sums are under 2% of what must move if they have MIN_ROWS.
PROGRAMS_PER_MULTIPROCESSOR = 8
MIN_ROWS = 256


def column_sums(x: Tensor) -> Tensor:
    """The sums over the rows of x (M, N) with neighbouring values in a row: (N,) in x's dtype."""
    num_rows, num_cols = x.shape
    cols = min(MAX_COLS, max(16, next_power_of_2(num_cols)))
    rows = ELEMENTS // cols
    strips = max(1, ceil_div(num_cols, cols))
    multiprocessors, _ = device_limits(x)
    parts = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // strips)
    rows_per_program = ceil_div(max(MIN_ROWS, ceil_div(num_rows, parts)), rows) * rows
    parts = ceil_div(num_rows, rows_per_program)
    partial = x.new_empty((parts, num_cols), dtype=torch.float32)
    if x.numel() > 0:
        launch(
            _column_sums,
            (parts * strips, 1),
            (x, partial),
            (num_cols, x.stride(0)),
            *((num_rows, rows_per_program, strips), ()),
            (rows, cols),
            NUM_WARPS,
        )
    return partial.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "strips"])
def _column_sums(
    x_ptr,
    partial_ptr,
    num_cols,
    x_stride,
    num_rows,
    rows_per_program,
    strips,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    part = (tl.program_id(0) // strips).to(tl.int64)
    col = (tl.program_id(0) % strips) * COLS + tl.arange(0, COLS)
    in_row = col < num_cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, rows_per_program, ROWS):
        row = part * rows_per_program + step + tl.arange(0, ROWS)
        mask = in_row[None, :] & (row < num_rows)[:, None]
        total += tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + part * num_cols + col, tl.sum(total, axis=0), mask=in_row)
