"""The kernel that multiplies saved gradients by the upstream gradient, which is 1 more often than not."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_attn_ops.launch import ceil_div, device_limits, on_device_of

BLOCK = 4096
NUM_WARPS = 8
PROGRAMS_PER_MULTIPROCESSOR = 8  # as many as fit, so that those that have nothing to do are soon through


def multiply_(values: Tensor, factor: Tensor) -> None:
    """Contiguous values times a scalar, in float32, rounded once. A factor of 1 costs one launch, and the host does not
    wait to see it."""
    num_blocks = ceil_div(values.numel(), BLOCK)
    if num_blocks == 0:
        return
    programs = min(num_blocks, PROGRAMS_PER_MULTIPROCESSOR * device_limits(values)[0])
    with on_device_of(values):
        _multiply[(programs,)](values, factor, values.numel(), num_blocks, BLOCK=BLOCK, num_warps=NUM_WARPS)


@triton.jit(do_not_specialize=["num_blocks"])
def _multiply(values_ptr, factor_ptr, size, num_blocks, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0)):
            offset = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + offset, mask=offset < size)
            tl.store(values_ptr + offset, values.to(tl.float32) * factor, mask=offset < size)
