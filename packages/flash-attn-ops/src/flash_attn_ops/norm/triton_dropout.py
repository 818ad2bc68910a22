"""Dropout decisions on the GPU: the bits of ``dropout.keep_mask``."""

# Device code: its arguments are Triton's.
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_block(seed, offset, row, first_col, threshold, BRANCH: tl.constexpr, COLS: tl.constexpr):
    """Which of the elements (row, first_col + 0 .. COLS - 1) stay: (rows, COLS). One draw decides four columns."""
    quad = first_col // 4 + tl.arange(0, COLS // 4)
    word0, word1, word2, word3 = tl.philox(
        seed,
        quad[None, :],
        row.to(tl.int32)[:, None],  # the low half
        ((row >> 32) * 2 + BRANCH).to(tl.int32)[:, None],
        offset.to(tl.int32),
        7,
    )
    threshold = threshold.to(tl.uint32)
    even = tl.join(word0 >= threshold, word2 >= threshold)
    odd = tl.join(word1 >= threshold, word3 >= threshold)
    return tl.reshape(tl.join(even, odd), (row.shape[0], COLS))


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _mask(
    seed_ptr,
    mask_ptr,
    hidden_size,
    num_rows,
    threshold,
    BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first_col in range(0, hidden_size, COLS):
        col = first_col + tl.arange(0, COLS)
        keep = keep_block(
            tl.load(seed_ptr), tl.load(seed_ptr + 1), row, first_col, threshold, BRANCH=BRANCH, COLS=COLS
        )
        mask = (row < num_rows)[:, None] & (col < hidden_size)[None, :]
        tl.store(mask_ptr + (row * hidden_size)[:, None] + col[None, :], keep, mask=mask)
