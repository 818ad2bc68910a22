"""Dropout in the norm kernels: which elements, from which draw, and what of them backward sees."""

from __future__ import annotations

import pytest
import torch
from flash_attn_ops.norm import layer_norm, rms_norm
from flash_attn_ops.norm.dropout import draw_seed_and_offset, keep_mask
from flash_attn_ops.testing import captured
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("many_norm_programs")]


@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 1), (5, 1030)], ids=str)
def test_dropout_masks_are_the_reference_ones(shape: tuple[int, ...], device: str) -> None:
    """Bit for bit, whatever device and block an element is in."""
    x = torch.ones(shape, device=device)
    torch.manual_seed(5)
    seed = draw_seed_and_offset(x.device)
    torch.manual_seed(5)
    _, total, mask, mask1 = rms_norm(
        *(x, torch.ones(shape[-1], device=device)),
        x1=x,
        dropout_p=0.4,
        prenorm=True,
        return_dropout_mask=True,
    )
    expected, expected1 = (keep_mask(seed.cpu(), x.shape, 0.4, branch) for branch in (0, 1))
    assert torch.equal(mask.cpu(), expected) and torch.equal(mask1.cpu(), expected1)
    torch.testing.assert_close(total.cpu(), (expected.float() + expected1.float()) / 0.6)
    if x.numel() > 1000:
        assert abs(mask.float().mean().item() - 0.6) < 0.01 and not torch.equal(mask, mask1)


def test_dropout_follows_the_generator(device: str) -> None:
    """The same seed gives the same bits, the next draw others; recomputation under checkpoint repeats the first."""
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device)

    def call(x: Tensor) -> Tensor:
        return rms_norm(x, weight, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(x), call(x)
    torch.manual_seed(1)
    again = call(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    (expected,) = torch.autograd.grad(first.square().sum() + first.sum(), x)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    torch.manual_seed(77)
    (dx,) = torch.autograd.grad(out.square().sum() + out.sum(), x)
    assert torch.equal(out, first) and torch.equal(dx, expected)


def test_dropout_in_a_cuda_graph() -> None:
    """Every replay draws again, and the backward in it drops what its forward dropped."""
    x = torch.randn(16, 512, device="cuda", requires_grad=True)
    weight = torch.ones(512, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        _, total, mask, _ = rms_norm(x, weight, dropout_p=0.5, prenorm=True, return_dropout_mask=True)
        (dx,) = torch.autograd.grad(total.sum(), x)
        return total, mask, dx

    graph, (total, mask, dx) = captured(step)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(mask.clone())
        assert torch.equal(total, torch.where(mask, x * 2, 0.0)) and torch.equal(dx, mask * 2.0)
    assert not torch.equal(*masks)


def test_dropped_elements_may_hold_anything(device: str) -> None:
    x = torch.randn(6, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device)
    torch.manual_seed(3)
    out, mask, _ = layer_norm(x, weight, dropout_p=0.5, return_dropout_mask=True)
    (dx,) = torch.autograd.grad(out.square().sum() + out.sum(), x)
    poisoned = torch.where(mask, x.detach(), float("nan")).requires_grad_()
    torch.manual_seed(3)
    assert torch.equal(again := layer_norm(poisoned, weight, dropout_p=0.5), out)
    assert torch.equal(torch.autograd.grad(again.square().sum() + again.sum(), poisoned)[0], dx)
    assert not dx[~mask].any()


def test_more_than_2_to_the_31_elements_dropped() -> None:
    """Rows far down have decisions of their own, the reference's."""
    rows, size = 2**31 // 4096 + 5, 4096
    x = torch.ones(rows, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    torch.manual_seed(4)
    seed = draw_seed_and_offset(x.device)
    torch.manual_seed(4)
    with torch.no_grad():
        _, total = rms_norm(x, weight, dropout_p=0.5, prenorm=True)
    expected = keep_mask(seed, torch.Size((rows, 4)), 0.5, 0)
    assert torch.equal(total[:, :4] != 0, expected)
    assert not torch.equal(expected[:5], expected[-5:])


def test_dropout_compiles(device: str) -> None:
    """One graph; backward drops what forward dropped."""
    weight = torch.ones(64, device=device)

    def block(x: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x * 1, weight, dropout_p=0.5, prenorm=True, return_dropout_mask=True)

    x = torch.randn(5, 64, device=device, requires_grad=True)
    _, total, mask, _ = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(total, torch.where(mask, x * 2, 0.0))
    (dx,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(dx, mask * 2.0)
