"""Combining partial results gives attention over all keys, whatever the parts that saw nothing hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_combine
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor

INF = float("inf")


def partial_results(
    seed: int = 0, splits: int = 5, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and values of each part in fp64, and out and lse of each by the textbook. Some rows miss some parts."""
    generator = torch.Generator().manual_seed(seed)
    B, S, H, Dv, keys = 2, 7, 3, 6, 11
    scores = 3.0 * torch.randn(splits, B, H, S, keys, generator=generator, dtype=torch.float64)
    values = torch.randn(splits, B, H, keys, Dv, generator=generator, dtype=torch.float64)
    hidden = torch.rand(splits, B, H, S, 1, generator=generator) < 0.4
    hidden[:, 0, 0, 0] = True  # this row sees nothing at all
    hidden[1:, 0, 0, 1] = True  # and this one the first part alone
    hidden[0, 0, 0, 1] = False
    scores = scores.masked_fill(hidden, -INF)
    lse = torch.logsumexp(scores, dim=-1)
    out = (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ values).transpose(2, 3)
    whole_scores, whole_values = torch.cat(list(scores), dim=-1), torch.cat(list(values), dim=-2)
    whole_lse = torch.logsumexp(whole_scores, dim=-1)
    whole_out = (torch.softmax(whole_scores, dim=-1).nan_to_num(0.0) @ whole_values).transpose(1, 2)
    if packed:
        return out[:, 1], lse[:, 1], whole_out[1], whole_lse[1]
    return out, lse, whole_out, whole_lse


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_against_the_full_softmax(splits: int, packed: bool) -> None:
    out, lse, whole_out, whole_lse = partial_results(splits=splits, packed=packed)
    actual_out, actual_lse = flash_attn_combine(out, lse)
    assert actual_out.dtype == actual_lse.dtype == torch.float64
    torch.testing.assert_close(actual_out, whole_out)
    torch.testing.assert_close(actual_lse, whole_lse)
    actual_out, actual_lse = flash_attn_combine(out.float(), lse.float())
    assert actual_out.dtype == actual_lse.dtype == torch.float32
    torch.testing.assert_close(actual_out, whole_out.float())
    torch.testing.assert_close(actual_lse, whole_lse.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16])
def test_16_bit_parts(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    out, lse, whole_out, _ = partial_results()
    actual, actual_lse = flash_attn_combine(out.to(dtype), lse.float(), out_dtype=out_dtype)
    assert actual.dtype == (dtype if out_dtype is None else out_dtype) and actual_lse.dtype == torch.float32
    # The parts are rounded, and then their sum.
    plain = whole_out + torch.finfo(dtype).eps * whole_out.abs().max()
    assert_within_reference_error(actual, whole_out, plain, factor=1.0)


def test_out_dtype_is_rounded_to_once() -> None:
    out, lse, _, _ = partial_results()
    single = flash_attn_combine(out.float(), lse.float())[0]
    half = flash_attn_combine(out.float(), lse.float(), out_dtype=torch.bfloat16)[0]
    assert torch.equal(half, single.bfloat16())
    from_half = flash_attn_combine(out.bfloat16(), lse.float(), out_dtype=torch.float32)[0]
    assert not torch.equal(from_half, from_half.bfloat16().float())


@pytest.mark.parametrize("garbage", [float("nan"), INF, -INF, 1e38])
def test_parts_without_keys_may_hold_anything(garbage: float) -> None:
    out, lse, _, _ = partial_results()
    out, lse = out.float(), lse.float()
    empty = (lse == -INF).transpose(-1, -2).unsqueeze(-1)
    assert empty.any()
    clean, poisoned = (flash_attn_combine(out.masked_fill(empty, x), lse) for x in (0.0, garbage))
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert (clean[0][0, 0, 0] == 0).all() and clean[1][0, 0, 0] == -INF


def test_extreme_lse() -> None:
    out = torch.stack([torch.ones(1, 1, 1, 2), 3 * torch.ones(1, 1, 1, 2)])
    for value in (1e4, -1e4):
        combined, lse = flash_attn_combine(out, torch.full((2, 1, 1, 1), value))
        torch.testing.assert_close(combined, torch.full((1, 1, 1, 2), 2.0))
        torch.testing.assert_close(lse, torch.full((1, 1, 1), value + 0.6931))


def test_gradients() -> None:
    out, lse, _, _ = partial_results(splits=3)
    lse = torch.where(lse == -INF, 0.3, lse)
    assert torch.autograd.gradcheck(flash_attn_combine, (out.requires_grad_(), lse.requires_grad_()))


def test_compiles() -> None:
    torch._dynamo.reset()
    out, lse = (x.float() for x in partial_results()[:2])
    compiled = torch.compile(flash_attn_combine, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(out, lse), flash_attn_combine(out, lse))


OUT, LSE = torch.zeros(4, 2, 5, 3, 8), torch.zeros(4, 2, 3, 5)

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("list", {"out_partial": [OUT]}, r"out_partial: got list; expected a torch.Tensor"),
    ("no splits", {"out_partial": OUT[:0], "lse_partial": LSE[:0]}, r"out_partial: got shape \(0, 2, 5, 3, 8\)"),
    ("rank", {"out_partial": OUT[0, 0]}, r"out_partial: got shape \(5, 3, 8\); expected \(splits, batch"),
    (
        "queries before heads",
        {"lse_partial": LSE.transpose(2, 3)},
        r"lse_partial: got shape \(4, 2, 5, 3\); expected shape \(4, 2, 3, 5\)",
    ),
    ("fewer lse", {"lse_partial": LSE[:3]}, r"lse_partial: got shape \(3, 2, 3, 5\)"),
    ("integer", {"out_partial": OUT.long()}, r"out_partial: got dtype torch.int64; expected a floating-point"),
    ("16-bit lse", {"lse_partial": LSE.half()}, r"lse_partial: got dtype torch.float16; expected torch.float32"),
    ("device", {"lse_partial": LSE.to("meta")}, r"lse_partial: got device meta; expected the device of"),
    ("out dtype", {"out_dtype": torch.int32}, r"out_dtype: got torch.int32; expected a floating-point dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message + r"(.|\n)*Fix: "):
        flash_attn_combine(**{"out_partial": OUT, "lse_partial": LSE, **arguments})
