"""Dropout on the CUDA kernels: the mask itself, read off the results, in every direction and layout."""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn_kernels import flash_attn_func, flash_attn_varlen_func, portable
from flash_attn_kernels.inputs import AttentionInputs
from flash_attn_kernels.options import AttentionOptions
from flash_attn_kernels.philox import draw_seed_and_offset, keep_mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu

B, H, S = (
    3,
    2,
    256,
)  # with queries of 0 every weight is 1/256, so that unit vectors as values make the weights visible


def revealing_tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.zeros(B, S, H, 64, device="cuda", dtype=dtype)
    identity = torch.eye(S, device="cuda", dtype=dtype).reshape(1, S, 1, S)
    return q, torch.randn_like(q), identity.repeat(B, 1, H, 1)


def expected_mask(seed: int, dropout_p: float) -> Tensor:
    """bool (B, H, S, S), by the definition, after the same ``torch.manual_seed``."""
    torch.manual_seed(seed)
    flat_heads = torch.arange(B * H, device="cuda").reshape(B, H, 1, 1)
    positions = torch.arange(S, device="cuda")
    return keep_mask(draw_seed_and_offset(torch.device("cuda")), flat_heads, positions, positions, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.001, 0.17, 0.5, 0.9])
@pytest.mark.parametrize("varlen", [False, True])
def test_forward_and_backward_use_the_defined_mask(dropout_p: float, varlen: bool) -> None:
    leaves = [x.requires_grad_() for x in revealing_tensors()]
    torch.manual_seed(7)
    if varlen:
        cu_seqlens = torch.arange(0, B * S + 1, S, dtype=torch.int32, device="cuda")
        flat = (x.flatten(0, 1) for x in leaves)
        out = flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, S, S, dropout_p=dropout_p, strict=True)
        out = out.unflatten(0, (B, S))
    else:
        out = flash_attn_func(*leaves, dropout_p=dropout_p, strict=True)
    keep = expected_mask(7, dropout_p)
    weights = out.permute(0, 2, 1, 3)  # (B, H, query, key)
    assert torch.equal(weights != 0, keep)
    kept_weight = 1 / (S * (1 - dropout_p))
    torch.testing.assert_close(weights[keep], torch.full_like(weights[keep], kept_weight))
    unit_gradients = revealing_tensors()[2]
    (dv,) = torch.autograd.grad(out, leaves[2], unit_gradients)  # (B, key, H, query)
    assert torch.equal(dv.permute(0, 2, 3, 1) != 0, keep)


def test_the_portable_path_uses_the_same_mask() -> None:
    q, k, v = revealing_tensors()
    options = AttentionOptions(softmax_scale=1.0, dropout_p=0.17)
    torch.manual_seed(3)
    inputs = AttentionInputs(q, k, v, options, seed_and_offset=draw_seed_and_offset(q.device))
    out, _ = portable.forward(inputs)
    torch.manual_seed(3)
    ours = flash_attn_func(q, k, v, dropout_p=0.17, strict=True)
    assert torch.equal(out != 0, ours != 0)


@pytest.mark.parametrize("dropout_p", [0.01, 0.17, 0.5, 0.83])
def test_the_fraction_dropped(dropout_p: float) -> None:
    torch.manual_seed(11)
    out = flash_attn_func(*revealing_tensors(), dropout_p=dropout_p, strict=True)
    dropped = (out == 0).float().mean().item()
    assert abs(dropped - dropout_p) < 5 * math.sqrt(dropout_p * (1 - dropout_p) / out.numel())


def test_manual_seed_repeats_the_mask_and_calls_do_not() -> None:
    tensors = revealing_tensors()
    torch.manual_seed(5)
    first, second = (flash_attn_func(*tensors, dropout_p=0.5, strict=True) for _ in range(2))
    torch.manual_seed(5)
    again = flash_attn_func(*tensors, dropout_p=0.5, strict=True)
    assert torch.equal(first, again)
    # Two independent masks agree on half of their elements.
    agreement = ((first == 0) == (second == 0)).float().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(first.numel())


def test_recomputation_repeats_the_mask() -> None:
    q, k, v, dout = torch.randn(4, 2, 200, 4, 64, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for recompute in (False, True):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(1)

        def attend(*qkv: Tensor) -> Tensor:
            return flash_attn_func(*qkv, dropout_p=0.3, causal=True, deterministic=True, strict=True)

        out = checkpoint(attend, *leaves, use_reentrant=False) if recompute else attend(*leaves)
        gradients.append(torch.autograd.grad(out, leaves, dout))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_lse_is_undropped() -> None:
    q, k, v = torch.randn(3, 1, 150, 2, 64, device="cuda", dtype=torch.float16)
    _, lse = flash_attn_func(q, k, v, return_lse=True, strict=True)
    _, dropped_lse = flash_attn_func(q, k, v, dropout_p=0.6, return_lse=True, strict=True)
    torch.testing.assert_close(dropped_lse, lse)
