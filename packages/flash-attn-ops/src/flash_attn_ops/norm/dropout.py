"""Dropout decisions of the norms, keyed on what an element is: the same bits on every path, forward and backward.

The decision for column c of row r of input b (0 for x, 1 for x1) is word ``c % 4`` of

    Philox4x32-7(key = seed, counter = (c // 4, r mod 2^32, 2 (r // 2^32) + b, offset))

[Salmon et al., SC 2011] so that one draw serves four neighbouring columns, whatever block of the row a kernel
holds. An element is dropped iff its word is below p * 2^32.
"""

from __future__ import annotations

import torch
from flash_attn_kernels.philox import draw_seed_and_offset, philox4x32
from torch import Tensor

__all__ = ["draw_seed_and_offset", "drop_threshold", "keep_mask", "keep_scale"]

_MASK32 = 0xFFFFFFFF


def drop_threshold(dropout_p: float) -> int:
    """Words below it drop their element."""
    return min(round(dropout_p * 2**32), _MASK32)


def keep_scale(dropout_p: float) -> float:
    """What the elements that stay are multiplied by."""
    return 1.0 / (1.0 - dropout_p)


def keep_mask(seed_and_offset: Tensor, shape: torch.Size, dropout_p: float, branch: int) -> Tensor:
    """bool of ``shape`` (..., N), True where the element stays; rows are numbered in row-major order."""
    columns = shape[-1]
    num_rows = shape[:-1].numel()
    device = seed_and_offset.device
    seed, offset = seed_and_offset[0], seed_and_offset[1]
    row = torch.arange(num_rows, device=device).unsqueeze(1)
    counter = (
        torch.arange((columns + 3) // 4, device=device),
        row & _MASK32,
        (row >> 32) * 2 + branch,
        offset & _MASK32,
    )
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    word = torch.stack(words, dim=-1).flatten(1)[:, :columns]
    return (word >= drop_threshold(dropout_p)).view(shape)
