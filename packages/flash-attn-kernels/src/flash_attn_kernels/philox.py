r"""Dropout decisions from the Philox counter generator, keyed on what an element *is*, not on who computes it.

The decision for query row r and key column c of flattened head ``bh = batch * H + head`` is one 32-bit word of
``Philox4x32-7(key = seed, counter = (c // 2, (r // 16) * 8 + r % 8, bh, offset))``; the four words of a counter
serve the rows {r, r + 8} and the columns {c, c + 1}. That 2 x 2 group is what one thread of a tensor-core
accumulator holds, so a GPU kernel spends one draw on four elements whatever its tile sizes are, and every path,
forward and backward, sees the same mask. An element is dropped iff its word is below p * 2^32: no rounding of p.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _multiply_high_low(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * x``, both below 2^32, in int64 that cannot hold the full product."""
    low_part = constant * (x & 0xFFFF)
    high_part = constant * (x >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (((high_part & 0xFFFF) << 16) + low_part) & _MASK32
    return high, low


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64 tensors, broadcast together) for a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def draw_seed_and_offset(device: torch.device) -> Tensor:
    """``(seed, offset)`` int64 of shape (2,) from torch's generator of ``device``, drawn without a host sync."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def keep_mask(
    seed_and_offset: Tensor, flat_heads: Tensor, rows: Tensor, columns: Tensor, dropout_p: float
) -> Tensor:
    """Which elements survive dropout.

    Args:
        seed_and_offset: int64 (2,).
        flat_heads: int64, any shape that broadcasts to (..., 1, 1): batch * H + head.
        rows: int64 (R,) query indices within the sequence.
        columns: int64 (C,) key indices within the sequence.
        dropout_p: probability of dropping an element.

    Returns:
        bool (..., R, C), True where the element is kept.
    """
    seed, offset = seed_and_offset[0], seed_and_offset[1]
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    row_counter = ((rows // 16) * 8 + rows % 8).unsqueeze(-1)
    words = philox4x32((columns // 2, row_counter, flat_heads, offset & _MASK32), key)
    upper_row = (rows // 8 % 2 == 0).unsqueeze(-1)
    even_column = columns % 2 == 0
    word = torch.where(
        upper_row, torch.where(even_column, words[0], words[1]), torch.where(even_column, words[2], words[3])
    )
    return word >= round(dropout_p * 2**32)
