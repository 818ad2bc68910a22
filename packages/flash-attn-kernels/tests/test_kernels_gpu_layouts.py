"""Strides of inputs and gradients on the CUDA kernels, and the memory around them: never read, never written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flash_attn_kernels import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn_kernels.testing.attention_case import STRIDES, AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import check_attention, check_tensors, public_results
from torch import Tensor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("gradient_strides", STRIDES)
def test_strides_of_inputs_and_gradients(strides: str, gradient_strides: str) -> None:
    for layout, head_dims in (("dense", (64, 64)), ("packed", (128, 128)), ("dense", (33, 40))):
        case = AttentionCase(
            lengths=((130, 130), (130, 130)), layout=layout, head_dims=head_dims, causal=True, strides=strides,
            gradient_strides=gradient_strides,
        )  # fmt: skip
        check_attention(case)


@pytest.mark.parametrize("strides", ["transposed", "padded"])
def test_strides_change_no_bit(strides: str) -> None:
    contiguous, strided = (
        public_results(make_tensors(AttentionCase(strides=s, gradient_strides=s, deterministic=True)))
        for s in ("contiguous", strides)
    )
    assert all(torch.equal(contiguous[name], strided[name]) for name in contiguous)


def test_gradient_of_a_sum() -> None:
    """The gradient of ``out.sum()`` is one element, expanded over everything."""
    tensors = make_tensors(AttentionCase(lengths=((150, 150), (150, 150))))
    tensors.dout = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(tensors.dout.shape)
    check_tensors(tensors)


def test_gradient_of_the_lse_expanded_and_transposed() -> None:
    for lse_gradient in (
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        tensors = make_tensors(AttentionCase())
        tensors.dlse = lse_gradient(tensors.dlse)
        check_tensors(tensors)


PACKED_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "qkv": (flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func),
    "kv": (flash_attn_kvpacked_func, flash_attn_varlen_kvpacked_func),
}


@pytest.mark.parametrize("packing", PACKED_FUNCTIONS)
@pytest.mark.parametrize("varlen", [False, True])
def test_packed_functions_equal_separate_tensors(packing: str, varlen: bool) -> None:
    rows = (220,) if varlen else (2, 110)
    qkv = torch.randn(*rows, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 20, 20, 220], dtype=torch.int32, device="cuda")
    options = {"causal": True, "deterministic": True, "strict": True}
    dout = torch.randn(*rows, 4, 64, device="cuda", dtype=torch.bfloat16)

    separate = [x.detach().requires_grad_() for x in qkv.unbind(-3)]
    if varlen:
        expected = flash_attn_varlen_func(*separate, cu_seqlens, cu_seqlens, 200, 200, **options)
    else:
        expected = flash_attn_func(*separate, **options)
    expected_gradients = torch.autograd.grad(expected, separate, dout)

    packed = [qkv] if packing == "qkv" else [qkv[..., 0, :, :], qkv[..., 1:, :, :]]
    packed = [x.detach().requires_grad_() for x in packed]
    lengths = {"qkv": (cu_seqlens, 200), "kv": (cu_seqlens, cu_seqlens, 200, 200)}[packing] if varlen else ()
    out = PACKED_FUNCTIONS[packing][varlen](*packed, *lengths, **options)
    gradients = torch.autograd.grad(out, packed, dout)
    assert torch.equal(out, expected)
    stacked = torch.cat([g if g.dim() == qkv.dim() else g.unsqueeze(-3) for g in gradients], dim=-3)
    assert torch.equal(stacked, torch.stack(expected_gradients, dim=-3))


@pytest.mark.parametrize(
    "dims, heads", [(64, (4, 4)), (128, (6, 2)), (96, (8, 1)), (256, (2, 2)), (20, (2, 1))]
)
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
def test_one_gradient_has_the_bits_of_three(
    dims: int, heads: tuple[int, int], varlen: bool, deterministic: bool
) -> None:
    """Of heads in one tensor, on both kinds of kernels; dQ's sums have no order unless they are deterministic."""
    H, Hk = heads
    rows = (700,) if varlen else (2, 350)
    qkv = torch.randn(*rows, H + 2 * Hk, dims, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dout = torch.randn(*rows, H, dims, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 20, 20, 700], dtype=torch.int32, device="cuda")
    options = {"causal": True, "deterministic": deterministic, "strict": True}
    q, k, v = (x.detach().requires_grad_() for x in qkv.split((H, Hk, Hk), dim=-2))
    if varlen:
        expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 680, 680, **options)
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 680, num_heads_q=H, **options)
    else:
        expected = flash_attn_func(q, k, v, **options)
        out = flash_attn_qkvpacked_func(qkv, num_heads_q=H, **options)
    assert torch.equal(out, expected)
    dq, dk, dv = torch.autograd.grad(expected, (q, k, v), dout)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    assert gradient.is_contiguous() and torch.equal(gradient[..., H:, :], torch.cat([dk, dv], dim=-2))
    if deterministic:
        assert torch.equal(gradient[..., :H, :], dq)
    else:
        torch.testing.assert_close(gradient[..., :H, :], dq, rtol=2**-7, atol=2**-9)


MODIFIERS = {
    "attn_bias": "bhqk", "attn_mask": "hqk", "key_padding": True, "alibi_slopes": "bh", "sink_dtype": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("modifiers", [{}, MODIFIERS], ids=["plain", "modified"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_memory_around_the_tensors_is_not_read(head_dim: int, modifiers: dict) -> None:
    """Rows before and after every tensor hold NaN (True in a mask)."""
    case = AttentionCase(
        lengths=((100, 90), (100, 90)),
        head_dims=(head_dim, head_dim),
        deterministic=True,
        causal=True,
        **modifiers,
    )

    def surrounded(x: Tensor) -> Tensor:
        fill = True if x.dtype == torch.bool else math.nan
        larger = torch.full(
            (x.shape[0], x.shape[1] + 256, *x.shape[2:]), fill, device=x.device, dtype=x.dtype
        )
        return larger[:, 128:-128].copy_(x)

    expected = public_results(make_tensors(case))
    tensors = make_tensors(case)
    for name in ("q", "k", "v", "dout", "dlse"):
        setattr(tensors, name, surrounded(getattr(tensors, name)))
    for name in ("attn_bias", "key_padding_mask"):
        if name in tensors.modifiers:
            tensors.modifiers[name] = surrounded(tensors.modifiers[name])
    actual = public_results(tensors)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_memory_around_the_results_is_not_written(layout: str, head_dim: int) -> None:
    """Results come to lie in gaps between live tensors of their sizes, which must keep what they hold."""
    tensors = make_tensors(AttentionCase(head_dims=(head_dim, head_dim), layout=layout, attn_bias="bhqk"))
    results = public_results(tensors)
    sizes = [x.numel() * x.element_size() for x in results.values()]
    del results
    canaries = [
        torch.full((size,), 77, dtype=torch.uint8, device="cuda") for size in sizes for _ in range(24)
    ]
    del canaries[::2]
    for _ in range(3):
        public_results(tensors)
    assert all((canary == 77).all() for canary in canaries)
