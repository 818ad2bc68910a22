"""The counter generator behind dropout: known answers, the rate, and what it is keyed on."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels.philox import draw_seed_and_offset, keep_mask, philox4x32

ALL_ONES = 0xFFFFFFFF
# Known-answer vectors of the paper's reference implementation (10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox4x32(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key), rounds=10
    )
    assert tuple(int(word) for word in words) == expected


def mask(
    seed: int, offset: int, p: float, heads: int = 4, rows: int = 256, columns: int = 256
) -> torch.Tensor:
    seed_and_offset = torch.tensor([seed, offset])
    flat_heads = torch.arange(heads).reshape(heads, 1, 1)
    return keep_mask(seed_and_offset, flat_heads, torch.arange(rows), torch.arange(columns), p)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_is_p(p: float) -> None:
    kept = mask(1, 2, p).double()
    standard_error = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * standard_error


def test_mask_depends_on_seed_offset_and_head_only() -> None:
    base = mask(1, 2, 0.5)
    assert not torch.equal(base, mask(3, 2, 0.5)) and not torch.equal(base, mask(1, 5, 0.5))
    assert not torch.equal(base[0], base[1])
    window = keep_mask(
        torch.tensor([1, 2]),
        torch.arange(4).reshape(4, 1, 1),
        torch.arange(100, 140),
        torch.arange(7, 30),
        0.5,
    )
    assert torch.equal(window, base[:, 100:140, 7:30])


def test_seed_follows_manual_seed() -> None:
    torch.manual_seed(0)
    first = draw_seed_and_offset(torch.device("cpu"))
    assert not torch.equal(first, draw_seed_and_offset(torch.device("cpu")))
    torch.manual_seed(0)
    assert torch.equal(first, draw_seed_and_offset(torch.device("cpu")))
