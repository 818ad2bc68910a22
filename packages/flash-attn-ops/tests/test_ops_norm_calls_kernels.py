"""How the norm kernels are called: given memory, strides, some outputs only, compiled, fused with a linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flash_attn_ops.norm import layer_norm, rms_norm, rms_norm_linear, tiles
from flash_attn_ops.norm.dropout import draw_seed_and_offset
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("many_norm_programs")]

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@pytest.mark.parametrize("max_cols", [16, 32768])
def test_results_in_given_memory(max_cols: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place too: out over x, the sum over the residual, in both forward kernels."""
    monkeypatch.setattr(tiles, "MAX_FORWARD_COLS", max_cols)
    monkeypatch.setattr(tiles, "WIDE_COLS", 128)
    x, residual = torch.randn(2, 9, 300, device=device)
    weight = torch.randn(300, device=device)
    expected, total = layer_norm(x, weight, residual=residual, prenorm=True, weight1=weight * 2)[::2]
    out, memory = torch.empty_like(x), torch.empty_like(x)
    results = layer_norm(
        *(x, weight),
        residual=residual,
        prenorm=True,
        weight1=weight * 2,
        out=out,
        residual_out=memory,
    )
    assert results[0] is out and results[2] is memory
    assert torch.equal(out, expected) and torch.equal(memory, total)
    layer_norm(x, weight, residual=residual, prenorm=True, out=x, residual_out=residual)
    assert torch.equal(x, expected) and torch.equal(residual, total)


@pytest.mark.parametrize("autocast", [False, True])
def test_norm_and_linear(autocast: bool, device: str) -> None:
    """Equal to the two layers one after the other; backward has no normalised rows in memory but its own."""
    x, residual = (torch.randn(3, 7, 96, device=device, dtype=FP32, requires_grad=True) for _ in range(2))
    weight, bias, linear_bias = (torch.randn(n, device=device, requires_grad=True) for n in (96, 96, 40))
    linear_weight = (torch.randn(40, 96, device=device) / 10).requires_grad_()
    leaves = (x, residual, weight, bias, linear_weight, linear_bias)
    low = torch.bfloat16 if autocast else FP32
    results = []
    for fused in (True, False):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            if fused:
                product, total = rms_norm_linear(
                    x, weight, bias, linear_weight, linear_bias, residual=residual, prenorm=True
                )
                saved = product.grad_fn.saved_tensors
                assert not any(t is not None and t.shape == x.shape and t.dtype == low != FP32 for t in saved)
            else:
                out, total = rms_norm(x, weight, bias, residual=residual, prenorm=True, out_dtype=low)
                product = F.linear(out, linear_weight, linear_bias)
        assert product.dtype == low and total.dtype == FP32
        loss = product.float().square().sum() + total.sum()
        results.append([product, total, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        rtol, atol = (2e-2, 2e-1) if autocast else (1e-4, 1e-4)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_outputs_used(used: tuple[int, ...], device: str) -> None:
    x, residual = (torch.randn(4, 32, device=device, requires_grad=True) for _ in range(2))
    weight, bias, weight1, bias1 = (torch.randn(32, device=device, requires_grad=True) for _ in range(4))
    leaves = (x, residual, weight, bias, weight1, bias1)
    outputs = layer_norm(
        x, weight, bias, residual=residual, weight1=weight1, bias1=bias1, layerscale=weight, prenorm=True
    )
    total = x * weight + residual
    theirs = [F.layer_norm(total, (32,), *vectors) for vectors in ((weight, bias), (weight1, bias1))] + [
        total
    ]
    upstream = [torch.randn(4, 32, device=device) for _ in used]
    actual, expected = (
        torch.autograd.grad([results[index] for index in used], leaves, upstream, allow_unused=True)
        for results in (outputs, theirs)
    )
    for ours_, theirs_ in zip(actual, expected, strict=True):
        assert (ours_ is None) == (theirs_ is None)
        if ours_ is not None:
            torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-4)


def test_strided_inputs_and_gradients(device: str) -> None:
    """Rows with gaps, columns with gaps, an expanded gradient: same results as for contiguous copies."""
    weight = torch.randn(64, device=device)
    variants = {
        "rows with gaps": torch.randn(6, 100, device=device)[:, 20:84],
        "transposed": torch.randn(64, 6, device=device).t(),
        "batch of rows": torch.randn(3, 4, 64, device=device)[:, 1:3],
        "expanded": torch.randn(1, 64, device=device).expand(6, 64),
    }
    for name, x in variants.items():
        leaf, copy = x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()
        out, expected = (
            layer_norm(
                tensor, weight, x1=tensor, rowscale=torch.ones(()).to(tensor).expand(tensor.shape[:-1])
            )
            for tensor in (leaf, copy)
        )
        assert out.is_contiguous(), name
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_only_the_returned_sum_used(device: str) -> None:
    x, residual = (torch.randn(4, 32, device=device, dtype=BF16, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=device, dtype=BF16, requires_grad=True)
    _, total = rms_norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True)
    upstream = torch.randn_like(total)
    total.backward(upstream)
    assert torch.equal(x.grad, upstream.to(BF16)) and torch.equal(residual.grad, upstream.to(BF16))
    assert weight.grad is None


def test_double_backward_is_an_error(device: str) -> None:
    x = torch.randn(2, 16, device=device, requires_grad=True)
    out = rms_norm(x, torch.ones(16, device=device))
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_compiles_to_one_graph(norm, device: str) -> None:
    """With every combination of outputs: the sum returned, stored, neither; gradients of one dtype and of two."""

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, total = norm(x * 2, weight, bias, residual=residual, prenorm=True)
        out = norm(out, weight, residual=residual.half())
        scales = {"layerscale": weight / 2, "rowscale": residual.detach()[..., 0]}
        out, out1 = norm(out, weight, bias, x1=total, weight1=bias + 1, **scales)
        return (norm(out, weight, bias) + total + out1).square()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 12):
        shapes = ((3, rows, 64), (3, rows, 64), (64,), (64,))
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out, expected = compiled(*leaves), block(*copies)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), expected)


def test_given_memory_compiles(device: str) -> None:
    weight = torch.ones(64, device=device)

    def block(x: Tensor, out: Tensor, total: Tensor) -> Tensor:
        rms_norm(x, weight, residual=total, prenorm=True, out=out, residual_out=total)
        return out + total

    x, out, total = (torch.randn(5, 64, device=device) for _ in range(3))
    copies = out.clone(), total.clone()
    result = torch.compile(block, fullgraph=True, backend="aot_eager")(x, out, total)
    torch.testing.assert_close(result, block(x, *copies))
    torch.testing.assert_close((out, total), copies)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("present", [False, True])
def test_operators_keep_their_word(is_rms: bool, present: bool, device: str) -> None:
    """Schema and fake describe what the launchers do, with all optional tensors or none, dense or strided."""
    x = torch.randn(5, 3, 32, device=device).to(FP16).transpose(0, 1)
    vectors = torch.randn(5, 64, device=device)[:, ::2]
    weight, bias, weight1, bias1, layerscale = vectors
    residual = torch.randn(3, 5, 32, device=device)
    rowscale, seed = torch.rand(3, 5, device=device), draw_seed_and_offset(x.device)
    norm_forward = torch.ops.flash_attn_ops.norm_forward.default
    norm_backward = torch.ops.flash_attn_ops.norm_backward.default
    optional = [residual.half(), residual, rowscale, layerscale, seed, bias, weight1, bias1]
    x1, given, rowscale, layerscale, seed, bias, weight1, bias1 = optional if present else [None] * 8
    sum_dtype, dropout_p = (FP32, 0.2) if present else (FP16, 0.0)
    args = (x, x1, given, rowscale, layerscale, seed, weight, bias, weight1, bias1)
    args += (1e-5, dropout_p, is_rms, present, FP16, sum_dtype)
    torch.library.opcheck(norm_forward, (*args, present, True, None, None))
    torch.library.opcheck(norm_forward, (*args, present, False, None, None))
    memory = torch.empty(3, 5, 32, device=device, dtype=FP16)
    torch.library.opcheck(norm_forward, (*args, True, False, memory, memory.to(sum_dtype)))
    _, _, total, mean, rstd = norm_forward(*args, present, True, None, None)
    total = total if present else x
    mean = None if is_rms else mean
    d_out1 = residual if present else None
    args = (
        x,
        d_out1,
        given,
        total,
        x if present else None,
        rowscale,
        layerscale,
        seed,
        weight,
        weight1,
        mean,
        rstd,
    )
    dtypes = (FP32,) * 4 if present else (None,) * 4
    torch.library.opcheck(norm_backward, (*args, dropout_p, is_rms, present, FP16, *dtypes))
    if present:
        torch.library.opcheck(torch.ops.flash_attn_ops.norm_dropout_mask.default, (seed, x, 0.2, 1))
