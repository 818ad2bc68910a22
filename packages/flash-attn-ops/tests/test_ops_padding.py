"""The padding functions are the kernels layer's."""

from __future__ import annotations

import flash_attn_kernels
import torch
from flash_attn_ops import padding


def test_padding_is_the_kernels_layer() -> None:
    assert len(padding.__all__) == 6
    for name in padding.__all__:
        assert getattr(padding, name) is getattr(flash_attn_kernels, name)


def test_round_trip() -> None:
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens, indices, *_ = padding.unpad_input(x, mask)
    assert torch.equal(padding.pad_input(tokens, indices, 2, 3), x * mask[..., None])
