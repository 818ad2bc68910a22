"""The tolerance law over matrices of options in which every two values meet, on the CUDA kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from flash_attn_kernels.testing import pairwise
from flash_attn_kernels.testing.attention_case import AttentionCase
from flash_attn_kernels.testing.attention_check import check_attention

pytestmark = pytest.mark.gpu

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal top-left": {"causal": True, "causal_alignment": "top-left"},
    "window": {"window_size": (17, 5)},
    "diagonal": {"window_size": (0, 0)},
    "left window": {"window_size": (100, -1)},
    "right window": {"window_size": (-1, 70)},
    "causal window": {"causal": True, "window_size": (64, -1)},
    "window top-left": {"window_size": (130, 3), "causal_alignment": "top-left"},
}
BROADCAST_PATTERNS = ["".join(p) for size in range(5) for p in itertools.combinations("bhqk", size)]
BASE: dict[str, list[Any]] = {
    "dtype": [torch.float16, torch.bfloat16],
    "head_dims": [
        (64, 64), (128, 128), (96, 96), (192, 192), (256, 256), (192, 128), (64, 128), (128, 64), (32, 32),
        (40, 40), (80, 80), (33, 33), (7, 7), (160, 160), (255, 129),
    ],
    "heads": [(4, 4), (3, 1), (6, 2), (5, 5), (16, 1)],
    "lengths": [
        (64, 64), (333, 333), (65, 127), (129, 257), (257, 129), (1, 1), (1, 300), (300, 1), (0, 5), (5, 0),
        (600, 500),
    ],
    "mask": list(MASKS),
    "layout": ["dense", "packed", "seqused", "paged", "paged seqused"],
    "page_size": [1, 16, 77],
    "deterministic": [False, True],
    "strides": ["contiguous", "transposed", "padded", "misaligned", "every other", "expanded"],
    "gradient_strides": ["contiguous", "transposed", "misaligned", "expanded"],
}  # fmt: skip
MODIFIERS: dict[str, list[Any]] = {
    "softmax_scale": [None, 0.4, -0.3, 0.0],
    "softcap": [0.0, 1.5, 30.0],
    "attn_bias": [None, *BROADCAST_PATTERNS],
    "bias_dtype": [torch.float16, torch.bfloat16, torch.float32],
    "attn_mask": [None, "bhqk", "qk", "bk", "hq", "b", ""],
    "key_padding": [False, True],
    "alibi_slopes": [None, "h", "bh"],
    "sink_dtype": [None, torch.float32, torch.bfloat16],
    "dropout_p": [0.0, 0.17],
}


def cases(options: dict[str, list[Any]]) -> list[AttentionCase]:
    return [make_case(seed, **choice) for seed, choice in enumerate(pairwise(options))]


def make_case(seed: int, *, mask: str, lengths: tuple[int, int], layout: str, **choice: Any) -> AttentionCase:
    """Dense calls hold two sequences of the same lengths, the others a ragged set around them."""
    Sq, Sk = lengths
    ragged = (lengths, (0, 7), (1, 65), (Sk, Sq), (3, 0), (Sq, Sk + 5))
    return AttentionCase(
        lengths=(lengths, lengths) if layout == "dense" else ragged,
        layout=layout,
        seed=seed,
        **MASKS[mask],
        **choice,
    )


@pytest.mark.parametrize("case", cases(BASE))
def test_shapes_masks_and_layouts(case: AttentionCase, kernels: str) -> None:
    """Without score modifiers: the kernels that most calls run."""
    check_attention(case)


@pytest.mark.parametrize("case", cases(BASE | MODIFIERS))
def test_all_options(case: AttentionCase) -> None:
    check_attention(case)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_length_around_the_tile_sizes(head_dim: int, dtype: torch.dtype, kernels: str) -> None:
    lengths = (1, 63, 64, 65, 111, 113, 127, 128, 129, 255, 257)
    for causal, layout in itertools.product([False, True], ["packed", "seqused"]):
        check_attention(
            AttentionCase(
                dtype=dtype,
                head_dims=(head_dim, head_dim),
                heads=(2, 1),
                lengths=tuple(itertools.product(lengths, repeat=2)),
                layout=layout,
                causal=causal,
            )
        )
