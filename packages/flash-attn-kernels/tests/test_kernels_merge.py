"""Merging attentions over parts of the keys gives attention over all of them, forward and backward."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels import flash_attn_func, merge_attention_states
from torch import Tensor

PARTS = (5, 1, 14, 10)  # keys of each part


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 12, 4, 8), (2, 30, 2, 8), (2, 30, 2, 6))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, attn_mask=mask, return_lse=True)


def in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        flash_attn_func(q, *kv, attn_mask=part, return_lse=True)
        for *kv, part in zip(
            k.split(PARTS, dim=1), v.split(PARTS, dim=1), mask.split(PARTS, dim=-1), strict=True
        )
    ]
    return merge_attention_states([out for out, _ in parts], [lse for _, lse in parts])


def results(attend, tensors: list[Tensor], mask: Tensor) -> dict[str, Tensor]:
    out, lse = attend(*tensors, mask)
    loss = out.double().sin().sum() + lse.double().masked_fill(lse.isinf(), 0.0).square().sum()
    found = torch.autograd.grad(loss, tensors)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), found, strict=True))}


def masks() -> dict[str, Tensor]:
    everything = torch.ones(12, 30, dtype=torch.bool)
    some_parts_empty = everything.clone()
    some_parts_empty[:, :6] = False
    some_parts_empty[3:5, 6:20] = False
    some_rows_empty = some_parts_empty.clone()
    some_rows_empty[[0, 7]] = False
    return {
        "everything": everything,
        "causal": everything.tril(18),
        "some parts empty": some_parts_empty,
        "some rows empty": some_rows_empty,
        "nothing": torch.zeros_like(everything),
    }


@pytest.mark.parametrize("name", masks())
def test_merged_parts_are_the_whole(name: str) -> None:
    mask = masks()[name]
    actual, expected = (results(attend, tensors(), mask) for attend in (in_parts, whole))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_rows_that_no_part_saw() -> None:
    outs = [torch.zeros(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 3, 2), float("-inf"), requires_grad=True) for _ in range(2)]
    out, lse = merge_attention_states(outs, lses)
    assert (out == 0).all() and (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(
        (out, lse), outs + lses, (torch.ones_like(out), torch.ones_like(lse))
    ):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parts_are_merged_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    mask = masks()["everything"]
    exact = whole(q.double(), k.double(), v.double(), mask)
    out, lse = in_parts(q, k, v, mask)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(dtype).eps * exact[0].abs().max()  # of the parts, of the whole
    assert (out.double() - exact[0]).abs().max() <= rounding


def test_large_lse_does_not_overflow() -> None:
    out, lse = merge_attention_states(
        [torch.ones(1, 1, 2), 3 * torch.ones(1, 1, 2)], [torch.full((1, 1), 1e4), torch.full((1, 1), 1e4)]
    )
    torch.testing.assert_close(out, torch.full((1, 1, 2), 2.0))
    torch.testing.assert_close(lse, torch.full((1, 1), 1e4 + 0.6931))
    _, lse = merge_attention_states([torch.ones(1, 1, 2)] * 2, [torch.full((1, 1), -1e4)] * 2)
    torch.testing.assert_close(lse, torch.full((1, 1), -1e4 + 0.6931))


def test_packed_and_stacked_and_single() -> None:
    outs, lses = torch.randn(3, 7, 4, 8), torch.randn(3, 4, 7)
    stacked = merge_attention_states(outs, lses)
    listed = merge_attention_states(list(outs), list(lses))
    assert stacked[0].shape == (7, 4, 8) and stacked[1].shape == (4, 7)
    torch.testing.assert_close(stacked, listed)
    torch.testing.assert_close(merge_attention_states(outs[:1], lses[:1]), (outs[0], lses[0]))


def test_merging_is_associative() -> None:
    outs, lses = list(torch.randn(3, 2, 5, 4, 8).double()), list(torch.randn(3, 2, 4, 5).double())
    first = merge_attention_states(outs[:2], lses[:2])
    torch.testing.assert_close(
        merge_attention_states([first[0], outs[2]], [first[1], lses[2]]), merge_attention_states(outs, lses)
    )


def test_gradcheck() -> None:
    outs = torch.randn(3, 1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_attention_states, (outs, lses))


def test_compiles() -> None:
    torch._dynamo.reset()
    outs, lses = torch.randn(2, 7, 4, 8), torch.randn(2, 4, 7)
    compiled = torch.compile(merge_attention_states, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outs, lses), merge_attention_states(outs, lses))
