"""How the norm kernels cut their work: pure functions of sizes.

Measured on H200 GPUs with bfloat16, but for the rungs without a pipeline: those follow from the registers that the
compiled kernels take. What each rung is for is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flash_attn_ops.launch import next_power_of_2

MAX_FORWARD_COLS = 32768  # 32 warps with 32 values a thread: what 64 registers hold
WIDE_COLS = 4096  # column block of the kernels that walk along a row
WIDE_GRADIENT_COLS = 128  # columns of a block of the wide backward: 256 bytes of a row or more
WIDE_GRADIENT_VALUES = 8192  # of such a block, all its sums together: at most 64 a thread
# Of few rows: one program takes 2 to 6 us on an H100, many take 3 to 4, but one launch less saves 13 us of the host.
MAX_VALUES_OF_ONE_PROGRAM = 8192
MAX_ACCUMULATED_VALUES = 32768  # float32 sums that one program keeps in registers: half the register file


@dataclass(frozen=True)
class ForwardTile:
    """``rows`` by ``cols`` values, held by ``num_warps`` warps."""

    rows: int
    cols: int
    num_warps: int


@dataclass(frozen=True)
class BackwardTile:
    """``rows`` by ``parts * cols`` values at a time, and how many such programs share a multiprocessor.

    With several parts a row is read twice, the second time from cache, so that only one part of it is in registers
    beside the sums. ``pipelined`` asks for asynchronous copies of the next rows, through shared memory.
    """

    rows: int
    cols: int
    num_warps: int
    parts: int = 1
    programs_per_multiprocessor: int = 1
    pipelined: bool = True


@lru_cache(1024)
def forward_tile(hidden_size: int) -> ForwardTile | None:
    """16 values a thread up to 8k columns: two 16-byte loads, and few enough registers for full occupancy. None:
    a row does not fit in registers."""
    cols = max(16, next_power_of_2(hidden_size))
    if cols > MAX_FORWARD_COLS:
        return None
    if cols <= 2048:  # several rows a program: one short row does not pay for its launch
        return ForwardTile(rows=2048 // cols, cols=cols, num_warps=4)
    return ForwardTile(rows=1, cols=cols, num_warps=cols // (512 if cols <= 8192 else 1024))


@lru_cache(1024)
def backward_tile(hidden_size: int, accumulators: int) -> BackwardTile | None:
    """For that many gradients of vectors (of weight, bias, ...), which a program sums over its rows in registers.

    As many values a thread as leave room for the sums, and as many programs as fill the register file. None: the
    sums do not fit in registers.
    """
    cols = max(16, next_power_of_2(hidden_size))
    sums = cols * accumulators
    if sums > MAX_ACCUMULATED_VALUES:
        return None
    if sums > MAX_ACCUMULATED_VALUES // 2:
        # 16 warps have 128 registers a thread: 64 or fewer for sums, the rest for half a row. Copies through shared
        # memory would cost registers that are not there, and spill.
        return BackwardTile(rows=1, cols=cols // 2, num_warps=16, parts=2, pipelined=False)
    if cols <= 2048:
        return BackwardTile(rows=2048 // cols, cols=cols, num_warps=4, programs_per_multiprocessor=4)
    if cols <= 4096:
        return BackwardTile(rows=1, cols=cols, num_warps=8, programs_per_multiprocessor=2)
    # Beyond 8192 values, 32 of them a thread, the pipeline spills. 32 warps have registers enough for a plain norm, but
    # not for a dropout, which takes them 1.17 times the time of 16 warps (H100).
    return BackwardTile(rows=1, cols=cols, num_warps=min(16, cols // 512), pipelined=cols <= 8192)


@lru_cache(1024)
def backward_tile_of_few_rows(num_rows: int, hidden_size: int, accumulators: int) -> BackwardTile | None:
    """One program takes all rows, so that its sums are the gradients, and no second kernel has to add them up: with so
    little to do the host's time is what counts. None: too many rows, or too many sums beside the 16 values a thread.
    """
    cols = max(16, next_power_of_2(hidden_size))
    if accumulators > 2 or cols > 8192 or num_rows * cols > MAX_VALUES_OF_ONE_PROGRAM:
        return None
    rows = min(max(1, 8192 // cols), next_power_of_2(num_rows))
    return BackwardTile(rows=rows, cols=cols, num_warps=min(16, max(4, rows * cols // 512)))


@lru_cache(1024)
def backward_plan(tile: BackwardTile, bytes_per_column: int, shared_memory_bytes: int) -> tuple[int, int]:
    """``(stages, programs per multiprocessor)`` for loads of so many bytes a column, all tensors together.

    Three stages keep one step's rows in flight while another is computed, in two buffers of shared memory.
    Without room for them, programs that share the multiprocessor hide each other's waiting.
    """
    if not tile.pipelined:
        return 1, tile.programs_per_multiprocessor
    buffers_bytes = 2 * tile.rows * tile.cols * bytes_per_column
    scratch_bytes = 2 * tile.rows * tile.cols + 1024  # exchanges between threads; what the hardware reserves
    for programs in (tile.programs_per_multiprocessor, 1):
        if programs * (buffers_bytes + scratch_bytes) <= shared_memory_bytes:
            return 3, programs
    return 1, tile.programs_per_multiprocessor


def wide_gradient_rows(accumulators: int) -> int:
    """Rows of a block of the wide backward, which keeps a block of sums for each accumulator."""
    rows = WIDE_GRADIENT_VALUES // (WIDE_GRADIENT_COLS * next_power_of_2(accumulators))
    return min(32, max(1, rows))
