"""The same bits from run to run on the CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_func
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import public_results

pytestmark = pytest.mark.gpu

REPEATS = 20
RAGGED = ((1000, 777), (0, 5), (3, 1500), (900, 900), (257, 64))
CASES: dict[str, dict[str, Any]] = {
    "one key head for each": {"heads": (8, 8)},
    "grouped": {"heads": (8, 2)},
    "one key head for all": {"heads": (8, 1), "causal": True},
    "packed": {"lengths": RAGGED, "layout": "packed", "causal": True},
    "seqused": {"lengths": RAGGED, "layout": "seqused"},
    "window": {"window_size": (200, 50)},
    "dropout": {"dropout_p": 0.2},
    "bias": {"attn_bias": "bhqk"},
    "ALiBi": {"alibi_slopes": "h", "causal": True},
    "ALiBi of each batch": {"alibi_slopes": "bh"},
    "sink": {"sink_dtype": torch.float32},
    "key padding": {"key_padding": True},
    "packed with everything": {
        "lengths": RAGGED, "layout": "packed", "dropout_p": 0.2, "attn_bias": "bhqk", "attn_mask": "qk",
        "alibi_slopes": "bh", "sink_dtype": torch.float32, "softcap": 3.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_twenty_times(name: str, head_dims: tuple[int, int]) -> None:
    defaults = {"heads": (6, 2), "lengths": ((1000, 777), (1000, 777))}
    case = AttentionCase(head_dims=head_dims, deterministic=True, **{**defaults, **CASES[name]})
    tensors = make_tensors(case)
    first = public_results(tensors)
    for _ in range(REPEATS - 1):
        again = public_results(tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_outputs_have_the_same_bits_without_being_asked() -> None:
    """Only gradients may differ from run to run."""
    tensors = make_tensors(AttentionCase(lengths=((1000, 777), (1000, 777)), heads=(8, 2)))
    first = public_results(tensors)
    for _ in range(REPEATS - 1):
        again = public_results(tensors)
        assert torch.equal(first["out"], again["out"]) and torch.equal(first["lse"], again["lse"])


def test_torch_deterministic_algorithms_is_obeyed() -> None:
    q, k, v, dout = torch.randn(4, 1, 2000, 8, 64, device="cuda", dtype=torch.float16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [
            torch.autograd.grad(flash_attn_func(*leaves, strict=True), leaves, dout) for _ in range(REPEATS)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))
