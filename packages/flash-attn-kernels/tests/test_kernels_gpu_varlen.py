"""Packed and paged sequences on the CUDA kernels: empty ones, hints, shared pages, positions past the modifiers."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels import flash_attn_varlen_func
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import (
    assert_results_obey_the_law,
    check_attention,
    check_tensors,
    public_results,
)

pytestmark = pytest.mark.gpu

FEW_TOKENS = tuple((int(b % 9 == 4), int(b % 7 == 4)) for b in range(60))  # 7 queries, 8 keys in 60 sequences
RAGGED = ((5, 130), (0, 0), (200, 64), (1, 1), (64, 0), (0, 64), (257, 300))
MODIFIERS = {
    "attn_bias": "hqk", "attn_mask": "bqk", "key_padding": True, "alibi_slopes": "bh", "sink_dtype": torch.float32,
    "dropout_p": 0.17, "softcap": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["packed", "seqused", "paged", "paged seqused"])
@pytest.mark.parametrize("modifiers", [{}, MODIFIERS], ids=["plain", "modified"])
@pytest.mark.parametrize(
    "lengths", [FEW_TOKENS, RAGGED, ((0, 0), (0, 0))], ids=["few tokens", "ragged", "empty"]
)
def test_ragged_and_empty_sequences(layout: str, modifiers: dict, lengths: tuple) -> None:
    for causal in (False, True):
        check_attention(AttentionCase(lengths=lengths, layout=layout, causal=causal, **modifiers))


def test_no_sequences() -> None:
    q, k, v = (
        torch.randn(3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device="cuda")
    out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 0, 0, return_lse=True, strict=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("hint", [0, 1, 130, 100_000])
def test_maximum_lengths_are_only_hints(hint: int) -> None:
    tensors = make_tensors(AttentionCase(lengths=RAGGED, layout="packed", causal=True, deterministic=True))
    expected = public_results(tensors)
    tensors.layout.update(max_seqlen_q=hint, max_seqlen_k=hint)
    actual = public_results(tensors)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_thousands_of_sequences() -> None:
    B, Sq, Sk = 3000, 5, 7
    tensors = make_tensors(AttentionCase(lengths=((Sq, Sk),) * B, causal=True))
    leaves = [x.detach().flatten(0, 1).requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    cu_q, cu_k = (torch.arange(0, B * S + 1, S, dtype=torch.int32, device="cuda") for S in (Sq, Sk))
    out, lse = flash_attn_varlen_func(*leaves, cu_q, cu_k, Sq, Sk, causal=True, return_lse=True, strict=True)
    dlse = tensors.dlse.transpose(0, 1).flatten(1)
    gradients = torch.autograd.grad([out, lse], leaves, [tensors.dout.flatten(0, 1), dlse])
    results = {
        "out": out.unflatten(0, (B, Sq)),
        "lse": lse.unflatten(1, (B, Sq)).transpose(0, 1),
        **{f"d{name}": g.unflatten(0, (B, -1)) for name, g in zip("qkv", gradients, strict=True)},
    }
    assert_results_obey_the_law(results, tensors)


@pytest.mark.parametrize("rows, columns", [(31, 40), (1, 40), (31, 1), (300, 300), (0, 0)])
def test_positions_past_the_modifiers(rows: int, columns: int) -> None:
    """They have bias 0 and are invisible in a mask; a size of 1 stands for all of them."""
    case = AttentionCase(
        lengths=RAGGED, layout="packed", causal=True, attn_bias="bhqk", attn_mask="hqk", key_padding=True
    )
    tensors = make_tensors(case)
    for name in ("attn_bias", "attn_mask"):
        tensors.modifiers[name] = tensors.modifiers[name][:, :, :rows, :columns].contiguous()
    check_tensors(tensors)


@pytest.mark.parametrize("page_size", [1, 16, 77])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (33, 33)])
def test_pages(page_size: int, head_dims: tuple[int, int]) -> None:
    """In random order, the first shared by two sequences, the rest of the table -1, unused rows NaN."""
    lengths = ((5, 300), (1, 80), (0, 40), (130, 129), (77, 154))
    for causal in (False, True):
        check_attention(
            AttentionCase(
                lengths=lengths, layout="paged", page_size=page_size, head_dims=head_dims, causal=causal
            )
        )


def test_block_table_of_a_larger_table() -> None:
    tensors = make_tensors(AttentionCase(lengths=RAGGED, layout="paged"))
    expected = public_results(tensors)
    table = tensors.layout["block_table"]
    larger = torch.full((table.shape[0], table.shape[1] + 5), 2**30, dtype=torch.int32, device="cuda")
    larger[:, : table.shape[1]] = table
    for same_pages in (larger, larger[:, : table.shape[1]]):
        tensors.layout["block_table"] = same_pages
        assert torch.equal(public_results(tensors)["out"], expected["out"])


def test_one_page_many_times() -> None:
    """A sequence may hold a page several times: its keys then count several times."""
    tensors = make_tensors(AttentionCase(lengths=((50, 64),), layout="paged", page_size=16))
    page = tensors.layout["block_table"][0, :1].clone()
    tensors.layout["block_table"][:] = page
    arguments = {**tensors.arguments, "strict": True}
    many = flash_attn_varlen_func(tensors.q, tensors.k, tensors.v, **arguments)
    arguments["cu_seqlens_k"] = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    once = flash_attn_varlen_func(tensors.q, tensors.k, tensors.v, **arguments)
    torch.testing.assert_close(many[:50], once[:50])
